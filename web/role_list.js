/**
 * Suggestions for the text widget `role`: the roles of the connected model, else those that any model has.
 *
 * The input stays a text, which can be connected. The suggestions are the browser's own list, put on the field when
 * it gets the focus: the widget's own in Nodes 2.0, that of the dialog which the canvas opens.
 */

import { element } from './dom.js'
import { modelOf } from './model_of.js'
import { classOf, rootOf } from './node_line.js'

/**
 * @typedef {import('./node_line.js').LGraphNode} LGraphNode
 * @typedef {import('@comfyorg/comfyui-frontend-types').ComfyApp} ComfyApp
 */

const HAVE_ROLES = ['PerRoleAttentionConfig', 'AttentionSchedule']
const ID = 'attention_backends_roles'

/**
 * @param {ComfyApp} app
 * @param {import('./server.js').Server} server
 * @param {string[]} known
 */
export function suggestRoles(app, server, known) {
  document.addEventListener?.('focusin', async (event) => {
    const field = event.target
    if (!(field instanceof HTMLInputElement)) return
    const node = nodeOf(app, field)
    if (!node || !HAVE_ROLES.includes(classOf(node))) return
    suggest(field, known)
    const file = modelOf(node, rootOf(app))
    const { roles } = file ? await server.model(file).catch(() => ({ roles: [] })) : { roles: [] }
    if (roles.length) suggest(field, roles)
  })
}

/**
 * The node whose role the field holds, if any.
 *
 * @param {ComfyApp} app
 * @param {HTMLInputElement} field
 * @returns {LGraphNode | undefined}
 */
function nodeOf(app, field) {
  const canvas = /** @type {any} */ (app.canvas) // the published types lack getWidgetAtCursor
  if (field.closest('.graphdialog')) {
    return canvas.getWidgetAtCursor?.()?.name === 'role' ? canvas.node_over : undefined
  }
  const id = field.getAttribute('aria-label') === 'role' && field.closest('[data-node-id]')?.getAttribute('data-node-id')
  return id ? canvas.graph?.getNodeById(id) ?? canvas.graph?.getNodeById(Number(id)) : undefined
}

/**
 * @param {HTMLInputElement} field
 * @param {string[]} roles
 */
function suggest(field, roles) {
  const list = element('datalist', { id: ID }, ...roles.map((role) => element('option', { value: role })))
  document.getElementById(ID)?.remove()
  field.append(list) // inside the field it disturbs nobody who counts the elements beside it
  field.setAttribute('list', ID)
}
