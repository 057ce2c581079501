/** Texts of the panel, from locales/<language>/main.json through ComfyUI's own route for translations. */

/** @typedef {(key: string, values?: Record<string, string | number>) => string} Say */

/**
 * Loads the texts of a language, those that are missing in English.
 *
 * @param {{ fetchApi(route: string): Promise<Response> }} api
 * @param {string} language
 * @returns {Promise<Say>} a key such as `runs.none` to its text, `{name}` replaced by values; of a text with two forms,
 *   `{steps} step | {steps} steps`, the first where its last number is 1
 */
export async function loadWords(api, language) {
  /** @type {Record<string, any>} */
  const all = await api.fetchApi('/i18n').then(
    (response) => (response.ok ? response.json() : {}),
    () => ({})
  )
  const books = [language, language.split('-')[0], 'en'].map((name) => all[name]?.attentionBackends ?? {})
  return (key, values = {}) => {
    const path = key.split('.')
    for (const book of books) {
      const text = path.reduce((part, name) => part?.[name], book)
      if (typeof text === 'string') {
        return form(text, values).replace(/\{(\w+)\}/g, (whole, name) => String(values[name] ?? whole))
      }
    }
    return key
  }
}

/**
 * Texts in a row, empty ones left out, with the language's own mark between them: `a, b`.
 *
 * @param {(string | false | null | undefined)[]} texts
 * @param {Say} say
 * @param {'and' | 'then'} [mark] `then` where they have commas of their own: `a, b; c`
 */
export function inRow(texts, say, mark = 'and') {
  const [first = '', ...rest] = texts.flatMap((text) => text || [])
  return rest.reduce((before, next) => {
    const said = say(`row.${mark}`, { before, next })
    return said === `row.${mark}` ? `${before}${mark === 'and' ? ',' : ';'} ${next}` : said // no texts were loaded
  }, first)
}

/**
 * @param {string} text
 * @param {Record<string, string | number>} values
 */
function form(text, values) {
  const [one, many] = text.split(' | ')
  const numbers = [...one.matchAll(/\{(\w+)\}/g)].map(([, name]) => values[name]).filter(Number.isFinite)
  return many === undefined || numbers.at(-1) === 1 ? one : many
}
