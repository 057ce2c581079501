/**
 * Which open workflow queued a prompt, and what the nodes of each said last.
 *
 * The server's events name a prompt, not a workflow, and ids of nodes and of graphs repeat between workflows. So a
 * prompt that this page queues brings a mark of its workflow along, as an input of our nodes. The server takes that
 * input out again (nodes/history/queued_by.py) and tells the mark with the run.
 */

/**
 * @typedef {import('@comfyorg/comfyui-frontend-types').ComfyApp} ComfyApp
 * @typedef {import('./node_line.js').LGraphNode} LGraphNode
 * @typedef {{ class_type: string, text: string, kind: string }} Said
 */

const INPUT = 'attention_backends_mark'
/** Workflows whose runs are remembered, and nodes of each: a page can stay open for weeks. */
const KEPT = 200
/** Values of a node's `mode`. */
const [MUTED, BYPASSED] = [2, 4]

/**
 * @param {ComfyApp} app
 * @param {() => void} opened called after another workflow, or another state of this one, is shown
 */
export function workflowRuns(app, opened) {
  /** @type {WeakMap<object, string>} */
  const marks = new WeakMap()
  /** By mark, the workflow that queued last at the end. @type {Map<string, Map<string, Said>>} */
  const said = new Map()

  /** The open workflow; a front end without several has one for all. */
  const active = () => /** @type {object} */ (app.extensionManager?.workflow?.activeWorkflow ?? app)

  /** The mark of the open workflow, which is queueing. */
  function mark() {
    const workflow = active()
    const found = marks.get(workflow) ?? random()
    marks.set(workflow, found)
    put(said, found, said.get(found) ?? new Map())
    return found
  }

  // The published types lack this method of the front end's stores.
  const store = /** @type {any} */ (app.extensionManager?.workflow)
  store?.$onAction?.((/** @type {{ name: string, after: (then: () => void) => void }} */ { name, after }) => {
    if (name === 'openWorkflow') after(() => opened()) // also after undo, which makes the nodes anew
  })

  return {
    /**
     * Makes a node bring the mark: by a widget that is never seen and holds no value, so no saved workflow has it.
     *
     * @param {LGraphNode} node
     * @param {() => void} queued called when a prompt that has the node is about to be queued
     */
    carry(node, queued) {
      /** @type {string | undefined} */
      let next
      const widget = {
        name: INPUT, type: 'hidden', value: '', y: 0, serialize: false,
        hidden: true, // on the canvas
        computeSize: () => [0, -4], // front ends of 1.2x leave room for hidden widgets too: this and 4
        options: { hidden: true, canvasOnly: true }, // in Nodes 2.0 and in the panels beside the graph
        disabled: true, computedDisabled: true, // not offered as an input of a subgraph
        /** ComfyUI calls this right before it makes a prompt for the queue, and not before an export. */
        beforeQueued() {
          next = inPrompt(node) ? mark() : undefined
          if (next) queued()
        },
        afterQueued: () => void (next = undefined),
        /** What the prompt holds; an input that is undefined is not in the JSON. */
        serializeValue: async () => {
          const now = next
          next = undefined
          return now
        }
      }
      node.addCustomWidget?.(/** @type {any} */ (widget))
    },
    /**
     * Keeps what the nodes of a run say, if a workflow of this page queued it.
     *
     * @param {string | null | undefined} queuedBy
     * @param {(readonly [id: string, said: Said])[]} texts
     */
    keep(queuedBy, texts) {
      const all = said.get(queuedBy ?? '')
      for (const [id, one] of all ? texts : []) put(/** @type {Map<string, Said>} */ (all), id, one)
    },
    /** What the nodes of the shown workflow say, by their ids. */
    shown: () => said.get(marks.get(active()) ?? '') ?? new Map()
  }
}

/**
 * Whether a prompt that is made now has a node: a bypassed one is never asked what the prompt holds, so it would keep
 * a mark for the next export, as nothing is called after a request that failed.
 *
 * @param {LGraphNode} node
 * @returns {boolean}
 */
function inPrompt(node) {
  if (node.mode === MUTED || node.mode === BYPASSED) return false
  /** @type {any} */
  const root = node.graph?.rootGraph
  if (!root?.subgraphs?.size || node.graph === root) return true
  const all = [root, ...root.subgraphs.values()].flatMap((graph) => graph.nodes)
  return all.some((holder) => holder.subgraph === node.graph && inPrompt(holder))
}

/**
 * Puts an entry at the end of a map, and takes the first ones away when there are too many.
 *
 * @template V
 * @param {Map<string, V>} map
 * @param {string} key
 * @param {V} value
 */
function put(map, key, value) {
  map.delete(key)
  map.set(key, value)
  for (const oldest of map.keys()) {
    if (map.size <= KEPT) return
    map.delete(oldest)
  }
}

/** 128 random bits; `crypto.randomUUID` is missing where the page came without TLS from another machine. */
function random() {
  const bytes = crypto.getRandomValues(new Uint8Array(16))
  return [...bytes].map((byte) => byte.toString(16).padStart(2, '0')).join('')
}
