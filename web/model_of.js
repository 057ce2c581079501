/**
 * The file that a node's model comes from, as its loader names it: by links, through LoRAs and other patches, reroutes,
 * and in and out of subgraphs. Nothing is asked of the server for it.
 */

/** @typedef {import('./node_line.js').LGraphNode} LGraphNode */

/** The origin of a link inside a subgraph that comes from outside. */
const FROM_OUTSIDE = '-10'
/** Nodes between a loader and a sampler: more is a circle. */
const MOST = 100
const FILE = /\.(safetensors|sft|gguf|ckpt|pt|pth|bin)$/i
const OURS = 'AttentionBackendSelector'

/**
 * @param {any} node
 * @param {any} root the whole graph
 * @returns {string} empty where no loader is found
 */
export function modelOf(node, root) {
  let slot = modelSlot(node, 0)
  for (let count = 0; node && slot >= 0 && count < MOST; count += 1) {
    const link = linkTo(node, slot)
    if (!link) return ''
    let [graph, id, from] = [node.graph, link.origin_id, link.origin_slot]
    if (String(id) === FROM_OUTSIDE) {
      node = holderOf(graph, root)
      slot = from
      continue
    }
    let origin = graph?.getNodeById(id)
    while (origin?.subgraph) {
      const inner = originOf(origin.subgraph, from)
      if (!inner || String(inner.origin_id) === FROM_OUTSIDE) return ''
      graph = origin.subgraph
      from = inner.origin_slot
      origin = graph.getNodeById(inner.origin_id)
    }
    if (!origin) return ''
    node = origin
    slot = modelSlot(node, from)
    if (slot < 0) return fileOf(node)
  }
  return ''
}

/**
 * The link to an input, in the node's own graph: the front end's nodes of subgraphs answer with one inside of them.
 *
 * @param {any} node
 * @param {number} slot
 */
function linkTo(node, slot) {
  if (!node.subgraph) return node.getInputLink?.(slot)
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
 * @param {any} graph
 * @param {any} root
 */
function holderOf(graph, root) {
  const all = [root, ...(root?.subgraphs?.values() ?? [])].flatMap((one) => one?.nodes ?? [])
  return all.find((one) => one.subgraph === graph)
}

/**
 * The link to an output of a subgraph, from inside.
 *
 * @param {any} subgraph
 * @param {number} slot
 */
const originOf = (subgraph, slot) => subgraph.getLink?.(subgraph.outputs?.[slot]?.linkIds?.[0])

/** @param {any} node */
function fileOf(node) {
  const values = (node.widgets ?? []).map((/** @type {any} */ one) => one.value)
  return values.find((/** @type {unknown} */ value) => typeof value === 'string' && FILE.test(value)) ?? ''
}
