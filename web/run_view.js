/** One run in the panel: verdicts, picture, table, reasons, notes, and the files. */

import { addedUp, asCsv, backendName, byRole, columnsOf, fellBack, shortLine, sorted, sparseSum } from './account.js'
import { download, element, refill } from './dom.js'
import { heatStrip } from './heat_strip.js'
import { inWords } from './phrases.js'
import { inRow } from './words.js'

/**
 * @typedef {import('./server.js').Run} Run
 * @typedef {import('./server.js').Row} Row
 * @typedef {import('./words.js').Say} Say
 * @typedef {{
 *   column: keyof Row, descending: boolean, blocks: boolean, all: boolean, by: 'backend' | 'time',
 *   at: import('./heat_strip.js').Place | null
 * }} View
 */

/** Rows that a table shows at first; more would take longer to lay out than a person waits for. */
const SHOWN = 100

/** Findings of the guard that are shown, worst first. */
const GUARDED = 8

/** @returns {View} */
export const firstView = () => ({
  column: 'calls', descending: true, blocks: false, all: false, by: 'backend', at: null
})

/**
 * Shows a run in `place`. `view` keeps what the person chose, so that a later call with newer figures looks the same.
 *
 * @param {HTMLElement} place
 * @param {Run} run
 * @param {View} view
 * @param {Say} say
 * @param {import('./phrases.js').Phrases} [phrases] of the server's answer
 * @param {{ step?: number | null, steps: number }} [at] how far the run came
 */
export function showRun(place, run, view, say, phrases, at) {
  const again = () => showRun(place, run, view, say, phrases, at)
  const words = (/** @type {string} */ text) => inWords(text, phrases, say)
  const why = (/** @type {Row} */ row) => `${row.role}: ${words(row.reason ?? '')}`
  const reasons = [...new Set(run.rows.filter((row) => row.reason).map(why))]
  const outcome = run.outcome && { ...run.outcome, cause: words(run.outcome.cause) }
  const fallbacks = run.rows.reduce((sum, row) => sum + (fellBack(row) ? row.calls : 0), 0)
  const totals = addedUp(run.rows.map(({ role, backend, calls }) => ({ role, backend, calls })))
  const name = `attention_run_${run.number}`
  refill(
    place,
    element('p', { className: 'ab-line' }, shortLine(totals, fallbacks, outcome, say, at)),
    audit(run, say),
    ...(run.windows.length ? picture(run, view, say, again) : []), // none where the trace is off
    ...(run.rows.length ? table(run, view, say, again, words) : []),
    list('ab-sparse', say('run.sparse'), computedWhole(run, say, words)),
    list('ab-tuned', say('run.tuning'), run.tuning?.state ? [tuned(run.tuning, say)] : []),
    list('ab-reasons', say('run.reasons'), reasons),
    list('ab-guard', say('run.guard'), (run.guard ?? []).slice(0, GUARDED).map((found) => guarded(found, say, words))),
    list('ab-notes', say('run.notes'), run.notes.map(words)),
    run.bypass && list('ab-bypass', say('run.bypass'), [words(run.bypass)]),
    element(
      'div',
      { className: 'ab-buttons' },
      element('button', {
        type: 'button', className: 'ab-button', textContent: say('run.json'), 'data-key': `json ${run.number}`,
        on: { click: () => download(`${name}.json`, 'application/json', JSON.stringify(run, null, 2)) }
      }),
      element('button', {
        type: 'button', className: 'ab-button', textContent: say('run.csv'), 'data-key': `csv ${run.number}`,
        on: { click: () => download(`${name}.csv`, 'text/csv', asCsv(run)) }
      })
    )
  )
}

/**
 * @param {string} className
 * @param {string} title
 * @param {(string | HTMLElement)[]} items
 */
function list(className, title, items) {
  if (!items.length) return null
  return element(
    'section',
    { className, 'aria-label': title },
    element('h4', {}, title),
    element('ul', {}, ...items.map((item) => element('li', {}, item)))
  )
}

/**
 * What was asked for and what ran: one line where these are the same.
 *
 * @param {Run} run
 * @param {Say} say
 */
function audit(run, say) {
  const title = say('run.audit')
  if (!run.audit.length || run.audit.some((finding) => finding.verdict !== 'as asked')) {
    return list('ab-audit', title, run.audit.map((finding) => verdict(finding, say)))
  }
  const names = (/** @type {string[]} */ backends) => backends.map((one) => backendName(one, say)).join(' + ')
  const ran = inRow(run.audit.map(({ role, ran }) => `${role} ${names(Object.keys(ran))}`), say)
  return element('p', { className: 'ab-audit ab-as_asked' }, `✓ ${say('run.all_as_asked', { ran })}`)
}

/**
 * @param {import('./server.js').Finding} finding
 * @param {Say} say
 */
function verdict(finding, say) {
  const known = ['as asked', 'not for this role', 'explained', 'unexplained', 'role never called', 'not reached']
  const kind = known.includes(finding.verdict) ? finding.verdict.replaceAll(' ', '_') : 'unexplained'
  const ran = Object.entries(finding.ran).map(([backend, calls]) => `${backendName(backend, say)} ${calls}`)
  return element(
    'span',
    { title: finding.source },
    element('strong', {}, finding.role),
    ` ${say('run.asked', { asked: finding.asked, ran: inRow(ran, say) || '-' })} `,
    element('span', { className: `ab-verdict ab-${kind}` }, say(`verdict.${kind}`))
  )
}

/**
 * @param {import('./server.js').Guarded} found
 * @param {Say} say
 * @param {(text: string) => string} words of a reason
 */
function guarded(found, say, words) {
  const { role, block, backend, checked, alarms, relative_l2: error, relative_l2_limit: limit } = found
  const text = say('run.guarded', {
    role, block: block || '-', backend, checked, alarms, error: error ?? 'inf', limit: limit ?? '-'
  })
  if (!alarms) return text
  return element('span', { className: 'ab-unexplained' }, inRow([text, words(found.first_alarm ?? '')], say, 'then'))
}

/**
 * Calls of sparse backends that were computed whole, by role and reason.
 *
 * @param {Run} run
 * @param {Say} say
 * @param {(text: string) => string} words of a reason
 */
function computedWhole(run, say, words) {
  const names = [...new Set(run.rows.filter((row) => row.dense).map((row) => `${row.role} ${row.backend}`))]
  return names.flatMap((name) => {
    const { dense } = sparseSum(run.rows.filter((row) => row.dense && `${row.role} ${row.backend}` === name))
    return Object.entries(dense).map(([reason, calls]) => say('run.whole', { calls, name, reason: words(reason) }))
  })
}

/**
 * What became of the kinds of call for which `measured` was asked for.
 *
 * @param {import('./server.js').Tuning} tuning
 * @param {Say} say
 */
export function tuned(tuning, say) {
  const counts = /** @type {const} */ (['from_store', 'decided', 'open', 'not_tuned']).filter((name) => tuning[name])
  const counted = inRow(counts.map((name) => say(`tuning.${name}`, { count: tuning[name] })), say)
  return element(
    'span',
    {},
    element('strong', { className: `ab-${tuning.state}` }, say(`tuning.${tuning.state}`)),
    say('row.and', { before: '', next: `${say('tuning.kinds', { kinds: tuning.kinds })} (${counted})` })
  )
}

/**
 * @param {Run} run
 * @param {View} view
 * @param {Say} say
 * @param {() => void} again
 */
function picture(run, view, say, again) {
  const timed = run.rows.some((row) => row.ms !== null)
  const choice = (/** @type {'backend' | 'time'} */ by) =>
    element('button', {
      type: 'button', className: 'ab-button', textContent: say(`strip.by_${by}`), 'aria-pressed': view.by === by,
      'data-key': `by ${by} ${run.number}`,
      on: { click: () => { view.by = by; again() } }
    })
  return [
    element('h4', {}, say('strip.title')),
    timed &&
      element(
        'div',
        { className: 'ab-buttons', role: 'group', 'aria-label': say('strip.title') },
        choice('backend'),
        choice('time')
      ),
    heatStrip(run, timed ? view.by : 'backend', say, view)
  ]
}

/** @type {string[]} */
const NUMBERS = ['calls', 'ms', 'kept', 'expected_gain', 'measured_gain']

/**
 * @param {string} name of a column
 * @param {unknown} value
 * @param {Say} say
 * @param {(text: string) => string} words of a reason
 */
function cellText(name, value, say, words) {
  if (value === null || value === undefined) return ''
  if (name === 'reason') return words(String(value))
  if (name === 'backend') return backendName(String(value), say)
  if (name === 'mask') return maskText(String(value), say)
  if (name === 'ms') return Number(value).toFixed(1)
  if (name === 'kept') return `${Math.round(100 * Number(value))} %`
  if (name.endsWith('_gain')) return `${Number(value).toFixed(2)}x`
  return String(value)
}

/**
 * The kind of a mask and what was done with it, e.g. `key_padding, trimmed`; a name without a translation is shown unchanged.
 *
 * @param {string} mask
 * @param {Say} say
 */
export function maskText(mask, say) {
  const worded = (/** @type {string} */ part) => {
    const [, before, after] = part.match(/^(\d+) before and (\d+) after$/) ?? []
    if (before) return say('mask.window', { before, after })
    const words = say(`mask.${part.replaceAll(' ', '_')}`)
    return words.startsWith('mask.') ? part : words
  }
  return inRow(mask.split(', ').map(worded), say)
}

/**
 * @param {Run} run
 * @param {View} view
 * @param {Say} say
 * @param {() => void} again
 * @param {(text: string) => string} words of a reason
 */
function table(run, view, say, again, words) {
  const timed = run.rows.some((row) => row.ms !== null)
  const member = run.rows.some((row) => row.member)
  const left = { ms: timed, member, source: false } // the source stands in each row's tooltip
  const columns = columnsOf(run.rows).filter((name) => Reflect.get(left, name) !== false)
  const summed = view.blocks ? run.rows : byRole(run.rows, (blocks) => say('columns.blocks', { blocks }))
  const rows = sorted(summed, view.column, view.descending)
  const shown = view.all ? rows : rows.slice(0, SHOWN)
  const head = columns.map((name) => {
    const order = view.column === name ? (view.descending ? 'descending' : 'ascending') : 'none'
    const arrow = { descending: ' ▼', ascending: ' ▲', none: '' }[order]
    const sort = () => {
      view.descending = view.column === name ? !view.descending : NUMBERS.includes(name)
      view.column = name
      again()
    }
    return element(
      'th',
      { scope: 'col', 'aria-sort': order },
      element(
        'button',
        { type: 'button', 'data-key': `sort ${name} ${run.number}`, on: { click: sort } },
        say(`columns.${name}`),
        element('span', { 'aria-hidden': 'true' }, arrow)
      )
    )
  })
  const body = shown.map((row) => {
    const cells = columns.map((name) => {
      const value = row[name]
      // The label is shown where the panel is narrow and a row wraps.
      const className = NUMBERS.includes(name) ? 'ab-number' : ''
      return element('td', { className, 'data-label': say(`columns.${name}`) }, cellText(name, value, say, words))
    })
    return element('tr', { className: row.reason && !row.expected ? 'ab-fell-back' : '', title: row.source }, ...cells)
  })
  const blocks = element('input', {
    type: 'checkbox', checked: view.blocks, 'data-key': `blocks ${run.number}`,
    on: { change: () => { view.blocks = !view.blocks; again() } }
  })
  return [
    element('h4', {}, say('run.table')),
    element('label', { className: 'ab-check' }, blocks, say('run.blocks')),
    element(
      'div',
      {
        className: 'ab-scroll', role: 'region', tabIndex: 0, 'aria-label': say('run.table'),
        'data-key': `table ${run.number}`
      },
      element('table', {}, element('thead', {}, element('tr', {}, ...head)), element('tbody', {}, ...body))
    ),
    rows.length > shown.length &&
      element('button', {
        type: 'button', className: 'ab-button', textContent: say('run.all', { rows: rows.length }),
        'data-key': `all ${run.number}`,
        on: { click: () => { view.all = true; again() } }
      })
  ]
}
