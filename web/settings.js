/** The settings panel: a person's defaults for new nodes, and the switches of the machine that the server keeps. */

import { element } from './dom.js'
import { Refused } from './server.js'

/**
 * @typedef {NonNullable<import('@comfyorg/comfyui-frontend-types').ComfyExtension['settings']>[number]} SettingParams
 * @typedef {import('./server.js').Settings} Settings
 * @typedef {import('./server.js').Server} Server
 * @typedef {import('./words.js').Say} Say
 */

const CATEGORY = 'Attention Backends'
const NEW_NODES = 'New nodes'
const MACHINE = 'This server'

/**
 * The settings. The front end lists them from the last to the first.
 *
 * @param {Settings | null} found
 * @param {Server} server
 * @param {Say} say
 * @returns {SettingParams[]}
 */
export function settings(found, server, say) {
  if (!found) return [] // a server that could not be asked: new nodes keep their own defaults
  const { choices, accuracy, guard, defaults } = found
  const combo = (/** @type {(string | { text: string, value: string })[]} */ options, /** @type {unknown} */ first) => ({
    type: 'combo',
    options,
    defaultValue: first
  })
  const role = (/** @type {string} */ name) => ({
    ...combo(choices, choices[0]),
    name: say('settings.role', { role: name }),
    tooltip: say('settings.roles')
  })
  const seed = (/** @type {string} */ name) => ({ name, tooltip: say('settings.new_nodes') })
  const classes = (accuracy ?? []).map((value) => ({ text: say(`may_use.${value}`), value }))
  const own = (/** @type {() => HTMLElement} */ type) => ({ type, defaultValue: null })
  const environment = Object.entries(found.environment).map(([name, text]) => `${name}=${text}`)
  const variables = () => element('code', { style: 'white-space: pre-wrap; font-size: 12px' }, environment.join('\n'))
  /** @type {[group: string, name: string, rest: any][]} */
  const all = [
    [NEW_NODES, 'Backend', { ...seed(say('settings.backend')), ...combo(choices, defaults.backend) }],
    [NEW_NODES, 'Self', role('self')],
    [NEW_NODES, 'Cross', role('cross')],
    [NEW_NODES, 'Joint', role('joint')],
    [NEW_NODES, 'Accuracy', { ...seed(say('settings.accuracy')), ...combo(classes, defaults.accuracy) }],
    [NEW_NODES, 'Strict', { ...seed(say('settings.strict')), type: 'boolean', defaultValue: defaults.strict }],
    [NEW_NODES, 'Guard', { ...seed(say('settings.guard')), ...combo(guard, defaults.guard) }],
    // On, unlike the input's own default, which is that of graphs from before the input was there.
    [NEW_NODES, 'Recommended', { ...seed(say('settings.recommended')), type: 'boolean', defaultValue: true }],
    [
      MACHINE,
      'Hub',
      { name: say('settings.hub'), tooltip: say('settings.hub_tip'), ...own(() => hubSwitch(server, say)) }
    ],
    [
      MACHINE,
      'LogLevel',
      { name: say('settings.log_level'), tooltip: say('settings.log_tip'), ...own(() => levelSelect(server, say)) }
    ]
  ]
  if (found.machine?.trace) {
    const words = { name: say('settings.trace'), tooltip: say('settings.trace_tip') }
    all.push([MACHINE, 'Trace', { ...words, ...own(() => traceSelect(server, say)) }])
  }
  if (environment.length) {
    const words = { name: say('settings.environment'), tooltip: say('settings.environment_tip') }
    all.push([MACHINE, 'Environment', { ...words, ...own(variables) }])
  }
  return all.map(([group, name, rest], index) => {
    const id = `AttentionBackends.${group === MACHINE ? 'Machine' : 'NewNodes'}.${name}`
    return { id, category: [CATEGORY, group, name], sortOrder: all.length - index, ...rest }
  })
}

/**
 * A control of a setting that the server keeps. It shows what the server says, also after a refusal.
 *
 * @param {HTMLInputElement | HTMLSelectElement} control
 * @param {'hub' | 'log_level' | 'trace'} name
 * @param {() => unknown} value of the control
 * @param {(value: any, settings: Settings) => void} put the server's value into the control
 * @param {Server} server
 * @param {Say} say
 */
function serverSetting(control, name, value, put, server, say) {
  const said = element('span', { role: 'status', style: 'font-size: 12px; margin-inline-end: 8px' })
  const show = (/** @type {Settings} */ settings) => {
    const { value: now, variable } = settings.machine[name] ?? { value: undefined, variable: null }
    put(now, settings)
    control.disabled = variable !== null
    said.textContent = variable ? say('settings.held', { variable }) : ''
  }
  const failed = (/** @type {unknown} */ error) => {
    said.textContent = error instanceof Refused ? error.message : say('panel.lost')
  }
  control.disabled = true
  control.addEventListener('change', () => {
    server.changeSettings({ [name]: value() }).then(show, async (error) => {
      await server.settings().then(show, () => undefined)
      failed(error)
    })
  })
  server.settings().then(show, failed)
  return element('span', { style: 'display: inline-flex; align-items: center' }, said, control)
}

/**
 * @param {Server} server
 * @param {Say} say
 */
function hubSwitch(server, say) {
  const box = element('input', { type: 'checkbox', role: 'switch', 'aria-label': say('settings.hub') })
  const put = (/** @type {boolean} */ value) => {
    box.checked = value
    box.style.cssText = switchStyle(value)
  }
  put(false)
  box.addEventListener('change', () => put(box.checked))
  return serverSetting(box, 'hub', () => box.checked, put, server, say)
}

/**
 * The look of ComfyUI's switches, which a pack cannot make: its own types of settings are plain elements.
 *
 * @param {boolean} on
 */
function switchStyle(on) {
  const [place, colour] = on ? ['26px', 'var(--primary-background, #0b8ce9)'] : ['10px', 'var(--interface-stroke, #555)']
  const knob = 'var(--base-background, var(--comfy-menu-bg, #171718))'
  return `appearance: none; margin: 0 2px; width: 36px; height: 20px; border-radius: 10px; cursor: pointer;
    background: radial-gradient(circle at ${place} 50%, ${knob} 7.5px, transparent 8px) ${colour}`
}

/**
 * A choice that the server keeps.
 *
 * @param {'log_level' | 'trace'} name
 * @param {string} label
 * @param {(settings: Settings) => string[]} options
 * @param {(option: string) => string} words
 * @param {Server} server
 * @param {Say} say
 */
function select(name, label, options, words, server, say) {
  const style = 'background: var(--p-form-field-background, var(--comfy-input-bg)); min-width: 176px; height: 40px;' +
    'color: var(--p-form-field-color, var(--input-text)); padding: 0 8px; border-radius: 6px; font: inherit;' +
    'border: 1px solid var(--p-form-field-border-color, var(--border-color))'
  const made = element('select', { 'aria-label': label, style })
  const put = (/** @type {string} */ value, /** @type {Settings} */ found) => {
    made.replaceChildren(...options(found).map((option) => element('option', { value: option }, words(option))))
    made.value = value
  }
  return serverSetting(made, name, () => made.value, put, server, say)
}

/**
 * @param {Server} server
 * @param {Say} say
 */
function levelSelect(server, say) {
  const words = (/** @type {string} */ level) => level || say('settings.log_as_comfyui')
  return select('log_level', say('settings.log_level'), (found) => found.log_levels, words, server, say)
}

/**
 * @param {Server} server
 * @param {Say} say
 */
function traceSelect(server, say) {
  const words = (/** @type {string} */ mode) => say(`settings.trace_${mode}`)
  return select('trace', say('settings.trace'), (found) => found.traces ?? [], words, server, say)
}
