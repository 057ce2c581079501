/** Texts of the panel, from locales/<language>/main.json through ComfyUI's own route for translations. */

/** @typedef {(key: string, values?: Record<string, string | number>) => string} Say */

/**
 * Loads the texts of a language, those that are missing in English.
 *
 * @param {{ fetchApi(route: string): Promise<Response> }} api
 * @param {string} language
 * @returns {Promise<Say>} a key such as `runs.none` to its text, `{name}` replaced by values
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
        return text.replace(/\{(\w+)\}/g, (whole, name) => String(values[name] ?? whole))
      }
    }
    return key
  }
}
