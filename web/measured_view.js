/** The measured choices in the panel: what is kept on this server, what was found, and clear, export and import. */

import { download, element, refill } from './dom.js'
import { maskText, tuned } from './run_view.js'
import { Refused } from './server.js'
import { inRow } from './words.js'

/**
 * @typedef {import('./server.js').Measured} Measured
 * @typedef {import('./server.js').Choice} Choice
 * @typedef {import('./server.js').RunSummary} RunSummary
 * @typedef {import('./server.js').Server} Server
 * @typedef {import('./words.js').Say} Say
 */

/** @typedef {{ asks: boolean, all: boolean, others: boolean, run: RunSummary | undefined }} State */

/** What the server takes of a document (nodes/http/measured_routes.py). */
const MOST_BYTES = 4 << 20

/** Kinds of call that are shown at first. */
const SHOWN = 20

/**
 * The section without its title. `update` asks the server anew, `newest` takes the newest run for the state.
 *
 * @param {Server} server
 * @param {Say} say
 * @returns {{ element: HTMLElement, update: () => Promise<void>, newest: (run: RunSummary | undefined) => void }}
 */
export function measuredSection(server, say) {
  /** @type {State} */
  const state = { asks: false, all: false, others: false, run: undefined }
  const said = element('p', { className: 'ab-status', role: 'status' })
  const place = element('div')
  const file = element('input', {
    type: 'file', accept: '.json,application/json', hidden: true, 'aria-label': say('measured.import')
  })
  const root = element('div', { className: 'ab-measured' }, element('p', {}, say('measured.about')), place, said, file)
  /** @type {Measured | undefined} */
  let found
  let asked = 0

  const show = () => {
    if (!found) return
    refill(place, ...content(found, state, { clear, save, choose: () => file.click(), again: show }, say))
  }

  /**
   * Shows what the server answers; an answer that comes after that of a later request is left aside.
   *
   * @param {Promise<Measured>} answer
   * @param {(answer: any) => string} [words] what was done
   */
  async function take(answer, words) {
    const mine = ++asked
    try {
      const now = await answer
      if (mine !== asked) return
      found = now
      show()
      if (words) said.textContent = words(now)
    } catch (error) {
      said.textContent = error instanceof Refused ? error.message : say('panel.lost')
    }
  }

  const clear = () => take(server.clearMeasured(), ({ removed }) => say('measured.cleared', { removed }))

  async function save() {
    try {
      download('measured_choices.json', 'application/json', JSON.stringify(await server.exportMeasured(), null, 2))
    } catch (error) {
      said.textContent = error instanceof Refused ? error.message : say('panel.lost')
    }
  }

  file.addEventListener('change', async () => {
    const given = file.files?.[0]
    if (!given) return
    if (given.size > MOST_BYTES) {
      said.textContent = say('measured.too_large', { bytes: given.size, most: MOST_BYTES })
    } else {
      await take(server.importMeasured(await given.text()), ({ taken }) => say('measured.imported', { taken }))
    }
    file.value = '' // else the same file could not be chosen again
  })

  return {
    element: root,
    update: () => take(server.measured()),
    newest(run) {
      const known = JSON.stringify([state.run?.number, state.run?.tuning])
      state.run = run
      if (known !== JSON.stringify([run?.number, run?.tuning])) show()
    }
  }
}

/**
 * @param {Measured} found
 * @param {State} state
 * @param {{ clear: () => void, save: () => void, choose: () => void, again: () => void }} act
 * @param {Say} say
 */
function content({ summary, entries }, state, act, say) {
  /** @type {(key: string, text: string, click: () => void, disabled?: boolean) => HTMLElement} */
  const button = (key, text, click, disabled = false) =>
    element('button', {
      type: 'button', className: 'ab-button', textContent: text, 'data-key': key, disabled, on: { click }
    })
  const turn = (/** @type {boolean} */ asks) => {
    state.asks = asks
    act.again()
  }
  if (!entries.length) state.asks = false
  const [here, others] = [entries.filter((entry) => entry.here), entries.filter((entry) => !entry.here)]
  const shown = state.all ? here : here.slice(0, SHOWN)
  const question = say('measured.sure', { entries: summary.entries })
  const { run } = state
  const facts = {
    state:
      run?.tuning?.state &&
      element('span', {}, say('measured.run', { number: run.number }), tuned(run.tuning, say)),
    kinds: say('measured.counts', { here: summary.entries_here, entries: summary.entries }),
    size: say('measured.kb', { kb: (summary.bytes / 1024).toFixed(1), file: summary.path_name })
  }
  return [
    summary.problem && element('p', { className: 'ab-hint' }, summary.problem),
    element(
      'dl',
      { className: 'ab-facts' },
      ...Object.entries(facts)
        .filter(([, value]) => value)
        .flatMap(([name, value]) => [element('dt', {}, say(`measured.${name}`)), element('dd', {}, value)])
    ),
    !entries.length && element('p', { className: 'ab-caption' }, say('measured.none')),
    here.length > 0 && element('ul', { className: 'ab-kinds' }, ...shown.map((entry) => kind(entry, say))),
    here.length > shown.length &&
      button('all measured', say('measured.all', { count: here.length }), () => {
        state.all = true
        act.again()
      }),
    others.length > 0 &&
      element(
        'details',
        { open: state.others, on: { toggle: (event) => (state.others = event.target.open) } },
        element('summary', { 'data-key': 'other machines' }, say('measured.others', { count: others.length })),
        element('ul', { className: 'ab-kinds' }, ...others.map((entry) => kind(entry, say)))
      ),
    state.asks
      ? element(
          'div',
          {
            className: 'ab-sure', role: 'group', 'aria-label': question,
            on: { keydown: (event) => event.key === 'Escape' && turn(false) }
          },
          element('p', {}, question),
          element(
            'div',
            { className: 'ab-buttons' },
            button('clear', say('measured.yes'), () => {
              state.asks = false
              act.clear()
            }),
            button('keep', say('measured.no'), () => turn(false))
          )
        )
      : element(
          'div',
          { className: 'ab-buttons' },
          button('export', say('measured.export'), act.save, !entries.length),
          button('import', say('measured.import'), act.choose),
          button('clear', say('measured.clear'), () => turn(true), !entries.length)
        )
  ]
}

/**
 * What was found for one kind of call: its candidates, the fastest first, each with a bar for its time.
 *
 * @param {Choice} entry
 * @param {Say} say
 */
function kind(entry, say) {
  const times = Object.entries(entry.ms).sort(([, a], [, b]) => a - b)
  const most = Math.max(...times.map(([, ms]) => ms))
  const facts = [
    say('measured.call', {
      q_len: entry.q_len, kv_len: entry.kv_len, heads: headsOf(entry), dtype: entry.dtype, batch: entry.batch
    }),
    entry.mask !== 'none' && say('measured.mask', { mask: maskText(entry.mask, say) }),
    entry.is_causal && say('measured.causal'),
    entry.exact_only && say('measured.exact_only'),
    entry.accuracy !== 'exact' && say('measured.allowed', { accuracy: say(`accuracy.${entry.accuracy}`) })
  ]
  return element(
    'li',
    {},
    element('strong', {}, entry.role),
    ' ',
    element('span', { className: 'ab-class' }, inRow(facts, say)),
    element(
      'ul',
      { className: 'ab-candidates' },
      ...times.map(([backend, ms]) => {
        const bar = element('span', { className: 'ab-bar', 'aria-hidden': 'true' })
        bar.style.inlineSize = `${(100 * ms) / most}%`
        const won = backend === entry.winner
        return element(
          'li',
          { className: won ? 'ab-winner' : '' },
          bar,
          element('span', {}, backend, won && element('em', {}, ` ${say('measured.winner')}`)),
          element('span', { className: 'ab-number' }, `${ms >= 100 ? ms.toFixed(0) : ms.toPrecision(3)} ms`)
        )
      })
    ),
    ...Object.entries(entry.rejected).map(([backend, reason]) =>
      element('p', { className: 'ab-said' }, say('measured.rejected', { backend, reason }))
    ),
    ...Object.keys(entry.put_off).map((backend) =>
      element('p', { className: 'ab-said' }, say('measured.put_off', { backend }))
    ),
    !entry.here && element('p', { className: 'ab-said' }, entry.environment)
  )
}

/** @param {Choice} entry */
function headsOf({ num_heads: heads, num_kv_heads: kvHeads, head_dim: dim, v_head_dim: vDim }) {
  return `${heads === kvHeads ? heads : `${heads}/${kvHeads}`} x ${dim === vDim ? dim : `${dim}/${vDim}`}`
}
