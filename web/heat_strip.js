/** A picture of a run: roles and blocks downwards, steps to the right, coloured by backend or by time. */

import { backendName } from './account.js'
import { element } from './dom.js'
import { inRow } from './words.js'

/**
 * @typedef {import('./server.js').Run} Run
 * @typedef {{ role: string, block: string }} Line
 * @typedef {[column: number, line: number]} Place
 * @typedef {{ calls: number, ms: number | null, backend: string, most: number, kept?: number }} Cell
 * @typedef {import('./server.js').Window} Window
 * @typedef {{ first: number, last: number, label: string, cells: Window['cells'] }} Part
 * @typedef {{ first: number, last: number, label: string, cells: Map<number, Cell> }} Column
 */

/** Told apart by people with any colour vision, on light and dark ground (Okabe and Ito). */
const COLOURS = ['#0072b2', '#e69f00', '#009e73', '#cc79a7', '#56b4e9', '#d55e00', '#b8a800', '#8a8a8a']
const TIME_COLOUR = '#d55e00'
const MOST_COLUMNS = 512

/**
 * The parts of a run to the right: the sampler's steps, from 0, or where they are not known its model calls, from 1.
 * Model calls of one step are one part. `label` differs from the place where a part begins inside a step.
 *
 * @param {Window[]} windows
 * @returns {{ steps: boolean, parts: Part[] }}
 */
export function parts(windows) {
  /** @type {Part[]} */
  const found = []
  for (const { steps, cells } of windows) {
    const before = found.at(-1)
    // Two samplers in one run begin at step 0 twice.
    if (!steps || (before && steps[0] < before.last)) return { steps: false, parts: windows.map((one) => part(one)) }
    const [first, last] = steps
    if (before && last === before.last) before.cells = [...before.cells, ...cells]
    else found.push(part({ first: before?.last === first ? first + 1 : first, last, cells }, first))
  }
  return { steps: found.length > 0, parts: found }
}

/**
 * @param {{ first: number, last: number, cells: Window['cells'] }} window
 * @param {number} from where it really begins
 * @returns {Part}
 */
function part({ first, last, cells }, from = first) {
  return { first, last, cells, label: from === last ? `${last}` : `${from}-${last}` }
}

/**
 * @param {Run} run
 * @returns {{ lines: Line[], steps: boolean, columns: Column[] }}
 */
export function grid(run) {
  /** @type {Line[]} */
  const lines = []
  /** @type {Map<string, number>} */
  const numbers = new Map()
  const order = new Intl.Collator('en', { numeric: true })
  const roles = [...new Set(run.rows.map((row) => row.role))]
  for (const role of roles) {
    const blocks = [...new Set(run.rows.filter((row) => row.role === role).map((row) => row.block))].sort(order.compare)
    for (const block of blocks) {
      numbers.set(`${role}\n${block}`, lines.length)
      lines.push({ role, block })
    }
  }
  const { steps, parts: found } = parts(run.windows)
  const columns = found.map(({ first, last, label, cells }) => {
    /** @type {Map<number, Cell>} */
    const inside = new Map()
    for (const [index, calls, ms, kept] of cells) {
      const row = run.rows[index]
      if (!row) continue
      const line = numbers.get(`${row.role}\n${row.block}`) ?? 0
      const cell = inside.get(line) ?? { calls: 0, ms: null, backend: row.backend, most: 0 }
      if (kept !== undefined) cell.kept = ((cell.kept ?? 1) * cell.calls + kept * calls) / (cell.calls + calls)
      cell.calls += calls
      if (ms !== null) cell.ms = (cell.ms ?? 0) + ms
      if (calls > cell.most) [cell.most, cell.backend] = [calls, row.backend]
      inside.set(line, cell)
    }
    return { first, last, label, cells: inside }
  })
  return { lines, steps, columns }
}

/**
 * The picture with its legend and a line that says what the pointer or the arrow keys are on.
 *
 * @param {Run} run
 * @param {'backend' | 'time'} by
 * @param {import('./words.js').Say} say
 * @param {{ at: Place | null }} view keeps what it is on
 * @returns {HTMLElement}
 */
export function heatStrip(run, by, say, view) {
  const { lines, steps, columns } = grid(run)
  const begin = columns[0]?.first ?? 1
  const length = (columns.at(-1)?.last ?? 1) - begin + 1
  const scale = Math.min(1, MOST_COLUMNS / length)
  const unit = steps ? 'steps' : 'calls'
  const backends = [...new Set(run.rows.map((row) => row.backend))]
  const names = backends.map((one) => backendName(one, say))
  const colour = (/** @type {string} */ backend) => COLOURS[backends.indexOf(backend) % COLOURS.length]
  const rate = (/** @type {Cell} */ cell, /** @type {{ first: number, last: number }} */ window) =>
    (cell.ms ?? 0) / (window.last - window.first + 1)
  const rates = columns.flatMap((window) => [...window.cells.values()].map((cell) => rate(cell, window)))
  const slowest = Math.max(0, ...rates)

  const canvas = element('canvas', {
    className: 'ab-strip',
    width: Math.max(1, Math.round(length * scale)),
    height: Math.max(1, lines.length),
    tabIndex: 0,
    role: 'img',
    'aria-label': say(`strip.label_${unit}`, { lines: lines.length, count: length, backends: inRow(names, say) }),
    'data-key': `strip ${run.number}`
  })
  canvas.style.height = `${Math.min(280, Math.max(24, lines.length * 6))}px`
  const context = canvas.getContext('2d')
  if (context) {
    for (const window of columns) {
      const from = Math.floor((window.first - begin) * scale)
      const width = Math.max(1, Math.floor((window.last - begin + 1) * scale) - from)
      for (const [line, cell] of window.cells) {
        const share = slowest ? rate(cell, window) / slowest : 0
        context.globalAlpha = by === 'time' ? 0.12 + 0.88 * share : 1
        context.fillStyle = by === 'time' ? TIME_COLOUR : colour(cell.backend)
        context.fillRect(from, line, width, 1)
      }
    }
  }

  const caption = element('p', { className: 'ab-caption', 'aria-live': 'polite' }, say('strip.hint'))
  let [column, line] = view.at ?? [0, 0]
  const tell = () => {
    view.at = [column, line]
    const window = columns[column]
    const { role, block } = lines[line] ?? { role: '', block: '' }
    const cell = window?.cells.get(line)
    const kept = cell?.kept !== undefined && say('line.kept', { percent: Math.round(100 * cell.kept) })
    const ms = cell && cell.ms !== null && `${cell.ms.toFixed(2)} ms`
    const what = cell ? inRow([backendName(cell.backend, say), `${cell.calls}`, ms, kept], say) : say('strip.none')
    caption.textContent = say(`strip.at_${unit}`, { role, block: block || '-', where: window?.label ?? '-', what })
  }
  canvas.addEventListener('pointermove', (event) => {
    const box = canvas.getBoundingClientRect()
    const at = Math.floor(((event.clientX - box.left) / box.width) * length) + begin
    column = Math.max(0, columns.findIndex((window) => window.last >= at))
    line = Math.min(lines.length - 1, Math.max(0, Math.floor(((event.clientY - box.top) / box.height) * lines.length)))
    tell()
  })
  canvas.addEventListener('keydown', (event) => {
    /** @type {Record<string, [number, number]>} */
    const moves = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }
    const move = moves[event.key]
    if (!move) return
    event.preventDefault()
    event.stopPropagation()
    column = Math.min(columns.length - 1, Math.max(0, column + move[0]))
    line = Math.min(lines.length - 1, Math.max(0, line + move[1]))
    tell()
  })

  if (view.at) tell() // the figures of a run that goes on are shown anew every second

  const swatch = (/** @type {string} */ background, /** @type {string} */ text) => {
    const square = element('span', { className: 'ab-swatch', 'aria-hidden': 'true' })
    square.style.background = background
    return element('li', {}, square, text)
  }
  const legend =
    by === 'backend'
      ? backends.map((backend, index) => swatch(colour(backend), names[index]))
      : [
          swatch(`color-mix(in srgb, ${TIME_COLOUR} 12%, transparent)`, say('strip.fast')),
          swatch(TIME_COLOUR, say(`strip.slow_${unit}`, { ms: slowest.toFixed(2) }))
        ]
  return element('div', { className: 'ab-heat' }, canvas, element('ul', { className: 'ab-legend' }, ...legend), caption)
}
