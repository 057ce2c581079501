/** Reasons and notes of the server in the page's language: by id and values where it sent them, else as they are. */

import { inRow } from './words.js'

/**
 * @typedef {import('./words.js').Say} Say
 * @typedef {{ id: string, text: string, values: Record<string, unknown> }} Phrase
 * @typedef {Record<string, Phrase>} Phrases by their English texts
 */

/**
 * @param {string} text as the server sent it
 * @param {Phrases | undefined} phrases of the same answer
 * @param {Say} say
 */
export function inWords(text, phrases, say) {
  const found = phrases?.[text]
  return found ? worded(found, say) : text
}

/**
 * @param {Phrase} phrase
 * @param {Say} say
 * @returns {string}
 */
function worded({ id, text, values }, say) {
  const shown = Object.fromEntries(Object.entries(values).map(([name, value]) => [name, valueText(value, say)]))
  const words = say(`said.${id.replaceAll('.', '_')}`, shown)
  return words.startsWith('said.') ? text : words // the key alone: the server is newer than this page
}

/**
 * @param {any} value
 * @param {Say} say
 */
function valueText(value, say) {
  if (Array.isArray(value)) {
    const parts = value.map((one) => (one?.id ? worded(one, say) : String(one)))
    return value[0]?.id ? inRow(parts, say, 'then') : `(${parts.join(', ')})`
  }
  return value?.id ? worded(value, say) : String(value)
}
