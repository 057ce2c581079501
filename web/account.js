/** Figures of a run: sums, the short line, and files. No element is made here. */

import { inRow } from './words.js'

/**
 * @typedef {import('./server.js').Row} Row
 * @typedef {import('./server.js').Run} Run
 * @typedef {import('./server.js').Total} Total
 */

/** Kinds of outcome in which nothing needs to be said beside the figures. */
const GOOD = ['running', 'done']
/** All kinds, the one that says most last. */
const WORST = ['running', 'done', 'partly', 'not_used', 'cancelled', 'refused', 'failed', 'out_of_memory']
/** The backend that a row names whose calls another pack computed. */
export const BY_ANOTHER = 'by another'

/**
 * @param {string} backend
 * @param {import('./words.js').Say} say
 */
export const backendName = (backend, say) => (backend === BY_ANOTHER ? say('run.by_another') : backend)

const COLUMNS = /** @type {const} */ ([
  'card', 'role', 'block', 'backend', 'member', 'calls', 'ms', 'kept', 'expected_gain', 'measured_gain', 'mask',
  'asked', 'source', 'reason'
])
/** Columns that only runs with a sparse backend have. Those on several devices alone have `card`. */
const OF_SPARSE = /** @type {const} */ (['kept', 'expected_gain', 'measured_gain'])

/**
 * Whether a row ran something else than was asked for, by a decision of ours; not where the backend that was asked for
 * in all roles is for no calls of this one.
 *
 * @param {Row} row
 */
export const fellBack = (row) => Boolean(row.reason) && !row.expected && row.backend !== BY_ANOTHER

/** @param {Row[]} rows */
export const columnsOf = (rows) => {
  const sparse = rows.some((row) => row.kept !== undefined)
  const divided = rows.some((row) => row.card !== undefined)
  return COLUMNS.filter((name) => (sparse || !OF_SPARSE.some((one) => one === name)) && (divided || name !== 'card'))
}

/**
 * Rows of all blocks of a role that took the same path, as one.
 *
 * @param {Row[]} rows
 * @param {(blocks: number) => string} words for a number of blocks
 * @returns {Row[]}
 */
export function byRole(rows, words) {
  /** @type {Map<string, Row & { blocks: Set<string>, same?: Row[] }>} */
  const sums = new Map()
  for (const row of rows) {
    const key = JSON.stringify([row.card, row.role, row.backend, row.member, row.mask, row.asked, row.reason])
    const sum = sums.get(key)
    if (!sum) {
      sums.set(key, { ...row, blocks: new Set([row.block]), same: row.kept === undefined ? undefined : [row] })
    } else {
      sum.calls += row.calls
      sum.ms = sum.ms === null || row.ms === null ? null : sum.ms + row.ms
      sum.blocks.add(row.block)
      sum.same?.push(row)
    }
  }
  return [...sums.values()].map(({ blocks, same, ...row }) => ({
    ...row,
    ...(same && sparseSum(same)),
    block: blocks.size === 1 ? row.block : words(blocks.size)
  }))
}

/**
 * What sparse rows of one role kept and gained together, as `backends/report/kept.of_rows` adds them up.
 *
 * @param {Row[]} rows
 */
export function sparseSum(rows) {
  let [calls, kept, time] = [0, 0, 0]
  /** @type {Record<string, number>} */
  const dense = {}
  for (const row of rows) {
    let whole = 0
    for (const [reason, count] of Object.entries(row.dense ?? {})) {
      dense[reason] = (dense[reason] ?? 0) + count
      whole += count
    }
    if (row.kept === null || row.kept === undefined) continue
    calls += row.calls - whole
    kept += (row.calls - whole) * row.kept
    time += row.measured_gain ? (row.calls - whole) / row.measured_gain : NaN
  }
  if (!calls) return { kept: null, expected_gain: null, measured_gain: null, dense }
  return { kept: kept / calls, expected_gain: calls / kept, measured_gain: time ? calls / time : null, dense }
}

/**
 * Sorted by one column: numbers by size, texts with the numbers in them by size too (`blocks.9` before `blocks.10`).
 *
 * @param {Row[]} rows
 * @param {keyof Row} column
 * @param {boolean} descending
 */
export function sorted(rows, column, descending) {
  const words = new Intl.Collator('en', { numeric: true })
  const sign = descending ? -1 : 1
  return [...rows].sort((a, b) => {
    const [x, y] = [a[column], b[column]]
    if (typeof x === 'number' || typeof y === 'number') return sign * (Number(x ?? -1) - Number(y ?? -1))
    return sign * words.compare(String(x ?? ''), String(y ?? ''))
  })
}

/**
 * What became of a run, in words; empty for one that goes on or ended well.
 *
 * @param {import('./server.js').Outcome | undefined} outcome
 * @param {import('./words.js').Say} say
 * @param {{ step?: number | null, steps: number }} [at] how far it came
 */
export function outcomeText(outcome, say, at) {
  if (!outcome || GOOD.includes(outcome.kind)) return ''
  if (outcome.kind === 'cancelled' && at?.step && at.steps) {
    return say('line.cancelled', { step: at.step, steps: at.steps })
  }
  return say(`outcome.${outcome.kind}`, { cause: outcome.cause })
}

/**
 * The outcome that says most of several runs.
 *
 * @param {(import('./server.js').Outcome | undefined)[]} outcomes
 * @returns {import('./server.js').Outcome | undefined}
 */
export function worst(outcomes) {
  const rank = (/** @type {import('./server.js').Outcome | undefined} */ one) => (one ? WORST.indexOf(one.kind) : -1)
  return outcomes.reduce((before, one) => (rank(one) > rank(before) ? one : before), undefined)
}

/**
 * `self cudnn_attn 1200 calls, cross torch_sdpa 600; 2 fallbacks`, behind what became of the run where that is to say.
 *
 * @param {Total[]} totals
 * @param {number} fallbacks
 * @param {import('./server.js').Outcome | undefined} outcome
 * @param {import('./words.js').Say} say
 * @param {{ step?: number | null, steps: number }} [at] how far it came
 */
export function shortLine(totals, fallbacks, outcome, say, at) {
  const said = outcomeText(outcome, say, at)
  if (!totals.length && outcome?.kind === 'running') return say('state.running')
  if (!totals.length) return said || say('line.nothing')
  const parts = totals.map(({ role, backend, calls }, index) => {
    const counted = index === 0 ? say('line.calls', { calls }) : calls
    return `${role} ${backendName(backend, say)} ${counted}`
  })
  return inRow([said, inRow(parts, say), fallbacks ? say('line.fallbacks', { fallbacks }) : ''], say, 'then')
}

/**
 * The totals of several runs as those of one.
 *
 * @param {Total[]} totals
 * @returns {Total[]}
 */
export function addedUp(totals) {
  /** @type {Map<string, Total>} */
  const sums = new Map()
  for (const { role, backend, calls } of totals) {
    const key = `${role} ${backend}`
    sums.set(key, { role, backend, calls: calls + (sums.get(key)?.calls ?? 0) })
  }
  return [...sums.values()]
}

/**
 * The rows of a run as CSV, one line each, every field quoted.
 *
 * @param {Run} run
 */
export function asCsv(run) {
  const quoted = (/** @type {unknown} */ value) => `"${String(value ?? '').replaceAll('"', '""')}"`
  const columns = columnsOf(run.rows)
  const lines = run.rows.map((row) => columns.map((column) => quoted(row[column])).join(','))
  return [columns.map(quoted).join(','), ...lines].join('\r\n') + '\r\n'
}
