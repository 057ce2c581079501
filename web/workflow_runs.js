/**
 * Which open workflow queued a prompt, and what the nodes of each said last.
 *
 * The server's events name a prompt, not a workflow, and ids of nodes and of graphs repeat between workflows. So the
 * call that queues a prompt is watched, as ComfyUI's pages on JavaScript hooks show it, and passed on as it is.
 */

/**
 * @typedef {import('@comfyorg/comfyui-frontend-types').ComfyApp} ComfyApp
 * @typedef {import('@comfyorg/comfyui-frontend-types').ComfyApi} ComfyApi
 * @typedef {{ class_type: string, text: string }} Said
 */

/** Prompts that are remembered: those that were taken out of the queue end without an event. */
const KEPT = 1000

/**
 * @param {ComfyApp} app
 * @param {ComfyApi} api
 * @param {() => void} opened called after another workflow, or another state of this one, is shown
 */
export function workflowRuns(app, api, opened) {
  /** @type {Map<string, object>} */
  const queuedBy = new Map()
  /** @type {WeakMap<object, Map<string, Said>>} */
  const said = new WeakMap()
  /** @type {Set<Promise<unknown>>} */
  const queueing = new Set()

  /** The open workflow; a front end without several has one for all. */
  const active = () => /** @type {object} */ (app.extensionManager?.workflow?.activeWorkflow ?? app)

  const queue = api.queuePrompt
  if (typeof queue === 'function') {
    api.queuePrompt = function (...given) {
      const workflow = active()
      const answer = queue.apply(this, given)
      /** @type {Promise<void>} */
      const noted = Promise.resolve(answer).then(
        (found) => {
          queueing.delete(noted)
          if (!found?.prompt_id) return
          queuedBy.set(found.prompt_id, workflow)
          for (const oldest of [...queuedBy.keys()].slice(0, -KEPT)) queuedBy.delete(oldest)
        },
        () => void queueing.delete(noted) // whoever queued it handles the error
      )
      queueing.add(noted)
      return answer
    }
  }

  // The published types lack this method of the front end's stores.
  const store = /** @type {any} */ (app.extensionManager?.workflow)
  store?.$onAction?.((/** @type {{ name: string, after: (then: () => void) => void }} */ { name, after }) => {
    if (name === 'openWorkflow') after(() => opened()) // also after undo, which makes the nodes anew
  })

  return {
    /**
     * Keeps what the nodes of a prompt say, if this page queued it.
     *
     * @param {string} prompt
     * @param {(readonly [id: string, said: Said])[]} texts
     */
    async keep(prompt, texts) {
      if (!queuedBy.has(prompt)) await Promise.all(queueing) // a short run can end before its answer is here
      const workflow = queuedBy.get(prompt)
      queuedBy.delete(prompt)
      if (!workflow) return
      const all = said.get(workflow) ?? new Map()
      for (const [id, one] of texts) all.set(id, one)
      said.set(workflow, all)
    },
    /** What the nodes of the shown workflow say, by their ids. */
    shown: () => said.get(active()) ?? new Map()
  }
}
