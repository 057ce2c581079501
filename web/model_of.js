/**
 * The file that a node's model comes from, as its loader names it: by links, through LoRAs and other patches, reroutes,
 * bypassed nodes, named connections, and in and out of subgraphs. Nothing is asked of the server for it.
 */

import { BYPASSED, MUTED } from './workflow_runs.js'

/** @typedef {import('./node_line.js').LGraphNode} LGraphNode */
/**
 * @typedef {{ root: any, holders: any[], left: number }} Way
 *   root: the whole graph; holders: the nodes of the subgraphs that were entered; left: nodes until it is a circle
 */

/** The origin of a link inside a subgraph that comes from outside. */
const FROM_OUTSIDE = '-10'
/** Nodes between a loader and a sampler: more is a circle. */
const MOST = 100
const FILE = /\.(safetensors|sft|gguf|ckpt|pt|pth|bin)$/i
const OURS = 'AttentionBackendSelector'
/** Nodes of the page alone, of KJNodes and Easy-Use: a getter gives what the setter of its name is connected to. */
const GETTER = /^(easy g|G)etNode$/
const SETTER = /^(easy s|S)etNode$/

/**
 * The value that a widget has in a prompt: its own, or that of the widget on a subgraph's node that it is promoted to.
 *
 * @param {any} node
 * @param {any} widget
 * @param {any} root the whole graph
 * @param {any[]} holders the nodes of the subgraphs around it, the outermost first; without, the first that are found
 * @returns {unknown}
 */
export const valueIn = (node, widget, root, holders = []) => shownOf(node, widget, { root, holders, left: MOST })

/**
 * @param {any} node
 * @param {any} root the whole graph
 * @returns {string} empty where no loader is found
 */
export const modelOf = (node, root) => cameIn(node, modelSlot(node, 0), { root, holders: [], left: MOST })

/**
 * @param {any} node
 * @param {number} slot of its inputs
 * @param {Way} way
 * @returns {string}
 */
function cameIn(node, slot, way) {
  const link = linkTo(node, slot)
  way.left -= 1
  if (!link || way.left < 0) return ''
  if (String(link.origin_id) !== FROM_OUTSIDE) {
    return wentOut(node.graph?.getNodeById(link.origin_id), link.origin_slot, way)
  }
  const holder = holderOf(node, way)
  return holder ? cameIn(holder, link.origin_slot, { ...way, holders: way.holders.slice(0, -1) }) : ''
}

/**
 * @param {any} node
 * @param {number} slot of its outputs
 * @param {Way} way
 * @returns {string}
 */
function wentOut(node, slot, way) {
  if (!node || node.mode === MUTED) return ''
  if (GETTER.test(node.type)) return cameIn(setterOf(node), 0, way)
  if (node.mode === BYPASSED) return cameIn(node, modelSlot(node, slot), way)
  if (node.subgraph) {
    const inner = originOf(node.subgraph, slot)
    if (!inner) return ''
    if (String(inner.origin_id) === FROM_OUTSIDE) return cameIn(node, inner.origin_slot, way)
    const holders = [...way.holders, node]
    return wentOut(node.subgraph.getNodeById(inner.origin_id), inner.origin_slot, { ...way, holders })
  }
  const from = modelSlot(node, slot)
  return from < 0 ? fileOf(node, way) : cameIn(node, from, way)
}

/**
 * The link to an input, in the node's own graph: the front end's nodes of subgraphs answer with one inside of them.
 *
 * @param {any} node
 * @param {number} slot
 */
function linkTo(node, slot) {
  if (slot < 0) return undefined
  if (!node?.subgraph) return node?.getInputLink?.(slot)
  /** @type {any[]} */
  const all = [...(node.graph?.links?.values?.() ?? [])]
  return all.find((link) => String(link.target_id) === String(node.id) && link.target_slot === slot)
}

/**
 * The input that a node's output comes from; -1 for a loader.
 *
 * @param {any} node
 * @param {number} output
 */
function modelSlot(node, output) {
  const inputs = /** @type {{ type: unknown, name: string }[]} */ (node.inputs ?? [])
  const models = inputs.flatMap(({ type }, slot) => (type === 'MODEL' ? [slot] : []))
  if (node.type === OURS && output === 1) return models[1] ?? -1
  if (models.length) return models[0]
  return inputs.length === 1 && inputs[0].type === '*' ? 0 : -1 // a reroute
}

/**
 * The setter of a getter's name.
 *
 * @param {any} getter
 */
function setterOf(getter) {
  const name = getter.widgets?.[0]?.value
  const isIts = (/** @type {any} */ one) => SETTER.test(one.type) && one.widgets?.[0]?.value === name
  return name ? getter.graph?.nodes?.find(isIts) : undefined
}

/**
 * The node of the subgraph that a node is in: the one through which we came in, or the first.
 *
 * @param {any} node
 * @param {Way} way
 */
function holderOf(node, { root, holders }) {
  const all = [root, ...(root?.subgraphs?.values() ?? [])].flatMap((one) => one?.nodes ?? [])
  return holders.at(-1) ?? all.find((one) => one.subgraph && one.subgraph === node.graph)
}

/**
 * The link to an output of a subgraph, from inside.
 *
 * @param {any} subgraph
 * @param {number} slot
 */
const originOf = (subgraph, slot) => subgraph.getLink?.(subgraph.outputs?.[slot]?.linkIds?.[0])

/**
 * The file that a loader names: its own, or the one that is chosen on the subgraph around it.
 *
 * @param {any} loader
 * @param {Way} way
 */
function fileOf(loader, way) {
  const values = (loader.widgets ?? []).map((/** @type {any} */ one) => shownOf(loader, one, way))
  return values.find((/** @type {unknown} */ value) => typeof value === 'string' && FILE.test(value)) ?? ''
}

/**
 * @param {any} node
 * @param {any} widget
 * @param {Way} way
 * @returns {unknown}
 */
function shownOf(node, widget, way) {
  /** @type {any[]} */
  const inputs = node.inputs ?? []
  const link = linkTo(node, inputs.findIndex((one) => one.widget?.name === widget.name))
  if (!link || String(link.origin_id) !== FROM_OUTSIDE) return widget.value
  const holder = holderOf(node, way)
  const shown = holder?.inputs?.[link.origin_slot]
  const outer = shown && holder.widgets?.find((/** @type {any} */ one) => one.name === (shown.widget?.name ?? shown.name))
  return outer ? shownOf(holder, outer, { ...way, holders: way.holders.slice(0, -1) }) : widget.value
}
