/** What a new node's widgets hold and show: a person's own defaults, which never touch a node that exists. */

import { classOf } from './node_line.js'

/** @typedef {import('./node_line.js').LGraphNode} LGraphNode */

/** Setting -> input of the selector. */
export const SELECTOR_SEEDS = {
  'AttentionBackends.NewNodes.Backend': 'backend',
  'AttentionBackends.NewNodes.Accuracy': 'accuracy',
  'AttentionBackends.NewNodes.Strict': 'strict',
  'AttentionBackends.NewNodes.Guard': 'guard',
  'AttentionBackends.NewNodes.Recommended': 'recommended'
}

/** Older name of a choice -> the name that it has now; settings may have stored it. */
const RENAMED = /** @type {Record<string, string>} */ ({ measured: 'autotune' })

/** Role -> setting. */
export const ROLE_SEEDS = {
  self: 'AttentionBackends.NewNodes.Self',
  cross: 'AttentionBackends.NewNodes.Cross',
  joint: 'AttentionBackends.NewNodes.Joint'
}

/**
 * Fills the widgets of a new node.
 *
 * @param {LGraphNode} node right after it was made
 * @param {boolean} loading a saved graph is being opened, so this node has values of its own
 * @param {(id: string) => unknown} setting
 */
export function seed(node, loading, setting) {
  if (loading) return
  const widget = (/** @type {string} */ name) => node.widgets?.find((one) => one.name === name)
  const standard = new Map((node.widgets ?? []).map((one) => [one.name, one.value]))
  const fill = (/** @type {string} */ name, /** @type {unknown} */ stored) => {
    const value = RENAMED[String(stored)] ?? stored
    const found = widget(name)
    const values = found?.options?.values
    if (!found || value === undefined || (Array.isArray(values) && !values.includes(value))) return
    found.value = /** @type {any} */ (value)
  }
  if (classOf(node) === 'AttentionBackendSelector') {
    for (const [id, name] of Object.entries(SELECTOR_SEEDS)) fill(name, setting(id))
  } else if (classOf(node) === 'PerRoleAttentionConfig') {
    seedRole(widget, fill, setting)
  } else {
    return
  }
  // A copy, or a node of a saved graph: values that it was saved without are the node's own, not the person's.
  const configured = node.onConfigure
  node.onConfigure = function (info) {
    const saved = info.widgets_values?.length ?? 0
    const own = (node.widgets ?? []).filter((one) => one.serialize !== false)
    for (const one of own.slice(saved)) one.value = standard.get(one.name)
    return configured?.call(this, info)
  }
}

/**
 * Shows the values of `accuracy` in words. The values themselves stay: graphs hold them.
 *
 * @param {LGraphNode} node
 * @param {import('./words.js').Say} say
 */
export function showInWords(node, say) {
  if (classOf(node) !== 'AttentionBackendSelector') return
  const options = /** @type {any} */ (node.widgets?.find((one) => one.name === 'accuracy')?.options)
  if (options) options.getOptionLabel = (/** @type {string | null} */ value) => say(`may_use.${value}`)
}

/**
 * The backend follows the role until the person chooses one.
 *
 * @param {(name: string) => any} widget
 * @param {(name: string, value: unknown) => void} fill
 * @param {(id: string) => unknown} setting
 */
function seedRole(widget, fill, setting) {
  const [role, backend] = [widget('role'), widget('backend')]
  if (!role || !backend) return
  const seedOf = () => setting(ROLE_SEEDS[/** @type {keyof typeof ROLE_SEEDS} */ (String(role.value).trim())]) ?? 'auto'
  fill('backend', seedOf())
  let filled = backend.value
  const before = role.callback
  role.callback = function (/** @type {any[]} */ ...given) {
    const result = before?.apply(this, given)
    if (filled !== undefined && backend.value === filled) {
      fill('backend', seedOf())
      if (backend.value !== filled) backend.callback?.(backend.value) // as if chosen: whether it can run here is asked
      filled = backend.value
    } else {
      filled = undefined
    }
    return result
  }
}
