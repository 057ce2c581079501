/** The words of the line on a node: from what the server foresees, and from what a run came to. No element is made here. */

import { addedUp, backendName, outcomeText, shortLine } from './account.js'
import { inWords } from './phrases.js'
import { inRow } from './words.js'

/**
 * @typedef {import('./server.js').Forecast} Forecast
 * @typedef {import('./server.js').NodeLine} NodeLine
 * @typedef {import('./words.js').Say} Say
 * @typedef {{ texts: string[], title: string, tone: 'plain' | 'grey' | 'bad' }} Words
 *   texts: the same in fewer and fewer words, to show the first that fits
 */

const DOT = ' · '
/** Smaller differences than this share of the other run's time are none. */
const EQUAL = 0.02
/** Kinds of outcome in which what was asked for was not done. */
const BAD = ['cancelled', 'refused', 'failed', 'out_of_memory', 'not_used', 'partly']
/** Backends that are named before the rest is counted. */
const NAMED = 2

/**
 * What a node will do.
 *
 * @param {Forecast} found
 * @param {{ isDefault: boolean, allow: string }} node isDefault: it sets the model's default, where `auto` decides
 *   something; allow: the label of the widget that allows more
 * @param {Say} say
 * @returns {Words}
 */
export function forecastWords(found, { isDefault, allow }, say) {
  const { backend, takes, faster, package: missing } = found
  if (backend === 'auto' && !isDefault) return plain([[say('line.as_without')]])
  if (!takes) {
    const said = found.reasons.map((reason) => inWords(reason, found.phrases, say))
    const reasons = say('line.cannot', { backend, reasons: inRow(said, say, 'then') })
    const first = missing
      ? say('line.install', { backend, package: missing })
      : say('line.cannot', { backend, reasons: said[0] ?? '' })
    return { texts: [first, say('line.cannot_short', { backend })], title: reasons, tone: 'bad' }
  }
  const apart = inRow((found.exceptions ?? []).map((what) => inWords(what, found.phrases, say)), say, 'then')
  const name = [found.without, found.flag && `(${found.flag})`].filter(Boolean).join(' ')
  if (found.kind === 'named') {
    if (takes === 'comfy') return plain([[say('line.comfy'), name], [say('line.comfy')]])
    const runs = say('line.runs', { backend: takes })
    const lossy = found.accuracy && found.accuracy !== 'exact' ? say(`line.lossy_${found.accuracy}`) : ''
    const by = found.source && say('line.by', { source: found.source })
    return plain([[runs, lossy, apart, by], [runs, lossy, apart], [runs, apart || by], [runs]])
  }
  if (found.kind === 'autotune') {
    const tries = found.tries
    if (tries.length < 2) return plain([[say('line.autotune_none', { backend: takes })]])
    return plain([
      [say('line.autotune', { backends: inRow(tries, say) }), apart],
      [say('line.autotune', { backends: listed(tries, say) })],
      [say('line.autotune_short', { count: tries.length })]
    ])
  }
  const head = found.by_model ? say('line.auto_model', { backend: takes }) : say('line.auto', { backend: takes })
  const exact = found.without_accuracy !== 'exact' && found.accuracy === 'exact' && found.same === false
  const other = exact ? 'line.exact_slower' : 'line.without'
  const same = found.same === null ? '' : found.same ? say('line.same') : say(other, { name })
  const short = exact ? say(other, { name: found.without }) : ''
  const better = faster ? say(`line.${faster.why}`, { backend: faster.backend, allow, accuracy: faster.accuracy }) : ''
  return plain([[head, apart, same, better], [head, apart || short || better], [head, same], [head]])
}

/**
 * What the runs of a node came to.
 *
 * @param {NodeLine} line
 * @param {string} warning what stood there before the run, if the backend cannot run
 * @param {Say} say
 * @returns {Words}
 */
export function ranWords(line, warning, say) {
  if (line.state === 'waiting' || !line.totals) return plain([[say('line.waiting')]])
  const { step, of_steps: steps } = line
  const words = (/** @type {string} */ text) => inWords(text, line.phrases, say)
  const outcome = line.outcome && { ...line.outcome, cause: words(line.outcome.cause) }
  const ran = [backendsOf(line, say), keptText(line.sparse, say)].filter(Boolean).join(DOT)
  const time = line.ms_per_step === null ? '' : duration(line.ms_per_step, say)
  if (line.state === 'running') {
    const at = step ? say('line.step', { step, steps }) : say('state.running')
    return { ...plain([[at, time, ran], [at, time], [at]]), tone: 'plain' }
  }
  const kind = outcome?.kind ?? 'done'
  const figures = [
    line.attention_share === null ? '' : say('line.share', { percent: Math.round(line.attention_share * 100) }),
    line.fallbacks && line.fallbacks === line.calls ? '' : savedText(line.saved, say) // nothing ran as asked
  ]
  const [share, saved] = figures
  const fell = line.fallbacks ? say('line.fell_back', { fallbacks: line.fallbacks, calls: line.calls }) : ''
  const cached = line.cached ? say('line.cached') : ''
  const recommended = line.offers.length ? say('line.recommended') : ''
  const tuning = line.tuning ? say('line.tuning') : ''
  const said = kind === 'cancelled' && step ? say('line.cancelled', { step, steps }) : outcomeText(outcome, say)
  const counted = said && !line.calls ? '' : shortLine(addedUp(line.totals), line.fallbacks, undefined, say)
  const done = kind === 'done' || kind === 'partly'
  const title = [
    warning, said, counted,
    done ? [time, share, saved, cached].filter(Boolean).join(DOT) : '', tuning, ...line.offers.map(words)
  ]
  const short = said || fell || ran || say('line.nothing')
  const texts = !done
    ? [[said || say('line.nothing'), ran], [said || say('line.nothing')]]
    : said
      ? [[said, ran, time, share], [said, ran], [said]]
      : [
          [ran, fell, time, share, saved, tuning, recommended, cached],
          [ran, fell, time, share, saved, recommended],
          [ran, fell, time, saved, share && !saved ? share : ''],
          [ran, fell || saved || time],
          [short]
        ]
  const bad = Boolean(warning || fell) || BAD.includes(kind)
  return { texts: distinct(texts), title: title.filter(Boolean).join('\n'), tone: bad ? 'bad' : 'plain' }
}

/**
 * `25 % kept`, or that nothing was left out.
 *
 * @param {NodeLine['sparse']} sparse
 * @param {Say} say
 */
function keptText(sparse, say) {
  if (!sparse || !(sparse.calls || sparse.whole)) return ''
  if (sparse.kept !== null) return say('line.kept', { percent: Math.round(100 * sparse.kept) })
  return sparse.calls ? '' : say('line.all_kept') // known later, while a run goes on
}

/** @param {string[][]} texts */
const distinct = (texts) => [...new Set(texts.map((parts) => parts.filter(Boolean).join(DOT)))].filter(Boolean)

/**
 * @param {string[][]} texts
 * @returns {Words}
 */
function plain(texts) {
  const all = distinct(texts)
  return { texts: all, title: all[0] ?? '', tone: 'grey' }
}

/**
 * `sage_attn`, or `sage_attn (self), torch_sdpa (cross)`.
 *
 * @param {NodeLine} line
 * @param {Say} say
 */
function backendsOf({ totals }, say) {
  /** @type {Map<string, { roles: string[], calls: number }>} */
  const found = new Map()
  for (const { role, backend, calls } of totals) {
    const one = found.get(backend) ?? { roles: [], calls: 0 }
    if (!one.roles.includes(role)) one.roles.push(role)
    found.set(backend, { ...one, calls: one.calls + calls })
  }
  const most = [...found].sort(([, a], [, b]) => b.calls - a.calls)
  if (most.length === 1) return backendName(most[0][0], say)
  return listed(most.map(([backend, { roles }]) => `${backendName(backend, say)} (${listed(roles, say)})`), say)
}

/**
 * The first names, and the number of the others.
 *
 * @param {string[]} names
 * @param {Say} say
 */
function listed(names, say) {
  const rest = names.length - NAMED
  return rest > 1 ? `${inRow(names.slice(0, NAMED), say)} +${rest}` : inRow(names, say)
}

/**
 * @param {number} ms
 * @param {Say} say
 */
function duration(ms, say) {
  if (ms >= 10_000) return say('line.seconds_per_step', { seconds: (ms / 1000).toFixed(1) })
  return say('line.ms_per_step', { ms: ms < 100 ? ms.toFixed(1) : Math.round(ms) })
}

/**
 * @param {NodeLine['saved']} saved
 * @param {Say} say
 */
function savedText(saved, say) {
  if (!saved || Math.abs(saved.seconds) < 0.05) return '' // 0.0 s
  const backend = listed(saved.than, say)
  const share = saved.seconds / saved.of
  if (Math.abs(share) < EQUAL) return say('line.equal', { backend })
  const values = { seconds: Math.abs(saved.seconds).toFixed(1), percent: Math.round(Math.abs(share) * 100), backend }
  return say(share > 0 ? 'line.saved' : 'line.lost', values)
}
