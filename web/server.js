/**
 * What the pack's server routes answer (nodes/http/routes.py), typed.
 *
 * @typedef {{ role: string, backend: string, calls: number }} Total
 * @typedef {{ id: string, class_type: string, backend: string }} Chooser
 * @typedef {{ kind: string, cause: string, text: string }} Outcome what became of a run; `text` is it in English
 * @typedef {{
 *   number: number, prompt_id: string | null, node_id: string | null, nodes: Chooser[], model: string,
 *   device: string, steps: number, seconds: number | null, state: 'running' | 'done' | 'stopped', calls: number,
 *   fallbacks: number, totals: Total[], offers?: string[], tuning?: Tuning, queued_by?: string | null,
 *   outcome?: Outcome, by_another?: number
 * }} RunSummary
 * @typedef {{
 *   role: string, block: string, backend: string, member: string | null, calls: number, ms: number | null,
 *   mask: string, asked: string | null, source: string, reason: string | null
 * }} Row
 * @typedef {{
 *   first: number, last: number, steps?: [first: number, last: number] | null,
 *   cells: [row: number, calls: number, ms: number | null][]
 * }} Window
 * @typedef {{
 *   role: string, asked: string, source: string, ran: Record<string, number>, reasons: string[], verdict: string
 * }} Finding
 * @typedef {{
 *   role: string, block: string, backend: string, checked: number, alarms: number, relative_l2: number | null,
 *   first_alarm: string | null, relative_l2_limit?: number | null
 * }} Guarded
 * @typedef {{
 *   state: 'tuning' | 'measured' | null, kinds: number, open: number, decided: number, from_store: number,
 *   not_tuned: number
 * }} Tuning
 * @typedef {{
 *   number: number, prompt_id: string | null, model: string, device: string, steps: number, seconds: number | null,
 *   state: 'running' | 'done' | 'stopped', bypass: string, rows: Row[], audit: Finding[], notes: string[],
 *   windows: Window[], guard?: Guarded[], tuning?: Tuning, outcome?: Outcome
 * }} Run
 * @typedef {{
 *   id: string, accuracy: string, available: boolean, reasons: string[], version: string | null, cards: string,
 *   probed: string | null, install: { kind: 'command' | 'page' | 'nothing', text: string, note: string } | null
 * }} Backend
 * @typedef {{
 *   platform: Record<string, any>, interpreter: { path: string, python: string, machine: string },
 *   hint: string | null, auto: string, backends: Backend[]
 * }} Machine
 * @typedef {{ value: any, variable: string | null }} MachineSetting
 * @typedef {{
 *   choices: string[], accuracy: string[], guard: string[], defaults: Record<string, any>, log_levels: string[],
 *   traces?: string[], machine: { hub: MachineSetting, log_level: MachineSetting, trace?: MachineSetting },
 *   environment: Record<string, string>
 * }} Settings
 * @typedef {{
 *   role: string, dtype: string, batch: number, num_heads: number, num_kv_heads: number, q_len: number,
 *   kv_len: number, head_dim: number, v_head_dim: number, mask: string, is_causal: boolean, exact_only: boolean,
 *   environment: string, here: boolean, accuracy: string, winner: string, incumbent: string,
 *   ms: Record<string, number>, rejected: Record<string, string>, put_off: Record<string, number>,
 *   written: number, origin: string
 * }} Choice
 * @typedef {{
 *   summary: { path_name: string, entries: number, entries_here: number, bytes: number, problem: string | null },
 *   entries: Choice[]
 * }} Measured
 */

/** A request that the server refused, with its reason. */
export class Refused extends Error {}

/**
 * The routes as functions. Each throws `Refused` with the server's reason, or the browser's own error where there is
 * no connection.
 *
 * @param {{ fetchApi(route: string, options?: RequestInit): Promise<Response> }} api
 */
export function serverRoutes(api) {
  /** @type {Map<string, Promise<Backend | undefined>>} */
  const asked = new Map()
  /** @type {(() => void)[]} */
  const outdated = []
  const forget = () => {
    asked.clear()
    for (const tell of outdated) tell()
  }

  /**
   * @param {string} route
   * @param {RequestInit} [options]
   */
  async function answer(route, options) {
    const response = await api.fetchApi(`/attention_backends/${route}`, options)
    if (response.ok) return response
    const said = await response.json().catch(() => ({}))
    throw new Refused(said.error ?? `${response.status} ${response.statusText}`)
  }

  /**
   * @param {string} route
   * @param {RequestInit} [options]
   */
  const json = async (route, options) => (await answer(route, options)).json()

  /**
   * @param {string} route
   * @param {string} body JSON
   */
  const post = (route, body) =>
    json(route, { method: 'POST', headers: { 'Content-Type': 'application/json' }, body })

  return {
    /** @returns {Promise<{ numbering: string, runs: RunSummary[] }>} */
    runs: () => json('runs'),
    /** @returns {Promise<{ numbering: string, run: Run }>} */
    run: (/** @type {number} */ number) => json(`runs/${number}`),
    /** @returns {Promise<Machine>} */
    machine: (refresh = false) => json(refresh ? 'machine?refresh=1' : 'machine'),
    /** @returns {Promise<Settings>} */
    settings: () => json('settings'),
    /** @returns {Promise<Settings>} */
    async changeSettings(/** @type {Record<string, unknown>} */ changes) {
      const found = await post('settings', JSON.stringify(changes))
      forget() // downloads that are allowed now make backends able to run
      return found
    },
    /** @returns {Promise<Measured>} */
    measured: () => json('measured'),
    /** @returns {Promise<Measured & { removed: number }>} */
    clearMeasured: () => post('measured/clear', '{}'),
    /** @returns {Promise<unknown>} */
    exportMeasured: () => json('measured/export'),
    /** @returns {Promise<Measured & { taken: number }>} */
    importMeasured: (/** @type {string} */ document) => post('measured/import', document),
    bugReport: async () => (await answer('bug_report')).text(),

    /**
     * One backend's state; undefined where the server does not know it. Asked once per page.
     *
     * @param {string} id
     */
    backend(id) {
      let found = asked.get(id)
      if (!found) {
        found = json(`machine?backend=${encodeURIComponent(id)}`).then(
          (machine) => machine.backends[0],
          (error) => {
            if (!(error instanceof Refused)) asked.delete(id) // no connection: ask again next time
            return undefined
          }
        )
        asked.set(id, found)
      }
      return found
    },
    /** Forget what `backend` was told, e.g. after the server was started again. */
    forget,
    /** @param {() => void} tell called whenever that was forgotten */
    onForget: (tell) => void outdated.push(tell)
  }
}

/** @typedef {ReturnType<typeof serverRoutes>} Server */
