/** This machine in the panel: versions, each backend's state, and how to get what is missing. */

import { copy, element, linked } from './dom.js'
import { inWords } from './phrases.js'
import { inRow } from './words.js'

/**
 * @typedef {import('./server.js').Machine} Machine
 * @typedef {import('./server.js').Backend} Backend
 * @typedef {import('./words.js').Say} Say
 */

/**
 * A button that copies a text and says so.
 *
 * @param {string} label
 * @param {string} key
 * @param {() => string | Promise<string>} text
 * @param {Say} say
 */
export function copyButton(label, key, text, say) {
  const button = element('button', { type: 'button', className: 'ab-button', textContent: label, 'data-key': key })
  button.addEventListener('click', async () => {
    const done = await Promise.resolve(text()).then((found) => copy(found, button), () => false)
    button.textContent = say(done ? 'copy.done' : 'copy.failed')
    setTimeout(() => (button.textContent = label), 2000)
  })
  return button
}

/**
 * @param {Machine} machine
 * @param {Say} say
 * @param {boolean} [open] whether those that can run are listed at once
 * @returns {HTMLElement[]}
 */
export function machineView(machine, say, open = true) {
  const { platform, backends } = machine
  const ready = backends.filter((backend) => backend.available)
  const card = [platform.card || platform.kind.toUpperCase(), platform.architecture, platform.sm]
  const packages = inRow(Object.entries(platform.packages).map(([name, version]) => `${name} ${version}`), say)
  const facts = {
    card: inRow(card, say),
    driver: platform.driver,
    torch: inRow([platform.torch, platform.cuda && `CUDA ${platform.cuda}`], say),
    cudnn: platform.cudnn,
    kernels: packages || say('machine.no_kernels'),
    auto: machine.auto,
    python: `${platform.python} (${machine.interpreter.machine})`,
    comfyui: platform.comfyui,
    pack: platform.attention_backends
  }
  const entries = Object.entries(facts).filter(([, value]) => value)
  return [
    element(
      'dl',
      { className: 'ab-facts' },
      ...entries.flatMap(([name, value]) => [
        element('dt', {}, say(`machine.${name}`)),
        element('dd', {}, String(value))
      ])
    ),
    ...(machine.hint ? [element('p', { className: 'ab-hint' }, inWords(machine.hint, machine.phrases, say))] : []),
    group(say('machine.available', { count: ready.length }), 'available', open, ready, say),
    group(
      say('machine.missing', { count: backends.length - ready.length }),
      'missing',
      false,
      backends.filter((backend) => !backend.available),
      say
    )
  ]
}

/**
 * @param {string} title
 * @param {string} key
 * @param {boolean} open
 * @param {Backend[]} backends
 * @param {Say} say
 */
function group(title, key, open, backends, say) {
  return element(
    'details',
    { className: 'ab-group', open },
    element('summary', { 'data-key': key }, title),
    element('ul', { className: 'ab-backends' }, ...backends.map((backend) => entry(backend, say)))
  )
}

/**
 * @param {Backend} backend
 * @param {Say} say
 */
function entry(backend, say) {
  const words = (/** @type {string} */ text) => inWords(text, backend.phrases, say)
  const said = backend.available ? backend.version ?? say('machine.built_in') : inRow(backend.reasons.map(words), say, 'then')
  const advice = backend.install
  const repeated = advice?.kind === 'nothing' && backend.reasons.some((reason) => advice.text.endsWith(reason))
  return element(
    'li',
    { className: backend.available ? 'ab-ready' : 'ab-missing' },
    element('span', { className: 'ab-mark', 'aria-hidden': 'true' }, backend.available ? '✓' : '✗'),
    element('strong', {}, backend.id),
    element('span', { className: 'ab-class' }, say(`accuracy.${backend.accuracy}`)),
    element('span', { className: 'ab-said' }, said),
    backend.probed && element('span', { className: 'ab-said' }, say('machine.probed', { outcome: backend.probed })),
    advice && advice.kind === 'command'
      ? element(
          'div',
          { className: 'ab-command' },
          element('code', { tabIndex: 0, 'data-key': `command ${backend.id}` }, advice.text),
          copyButton(say('copy.command'), `copy ${backend.id}`, () => advice.text, say)
        )
      : advice && advice.text && !repeated && element('span', { className: 'ab-said' }, ...linked(words(advice.text))),
    advice?.note && element('span', { className: 'ab-said' }, ...linked(words(advice.note)))
  )
}
