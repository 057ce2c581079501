/**
 * What the pack's server routes answer (nodes/http/routes.py), typed.
 *
 * @typedef {import('./phrases.js').Phrases} Phrases
 * @typedef {{ role: string, backend: string, calls: number }} Total
 * @typedef {{ id: string, class_type: string, backend: string }} Chooser
 * @typedef {{ kind: string, cause: string, text: string }} Outcome what became of a run; `text` is it in English
 * @typedef {{
 *   number: number, prompt_id: string | null, node_id: string | null, nodes: Chooser[], model: string,
 *   device: string, steps: number, seconds: number | null, state: 'running' | 'done' | 'stopped', calls: number,
 *   fallbacks: number, totals: Total[], offers?: string[], tuning?: Tuning, queued_by?: string | null,
 *   outcome?: Outcome, by_another?: number, begun?: number | null, seed?: number | string | null,
 *   sampler?: { id: string | null, class_type: string }, step?: number | null, ms_per_step?: number | null,
 *   attention_share?: number | null, compared?: number
 * }} RunSummary
 * @typedef {{
 *   card?: string, role: string, block: string, backend: string, member: string | null, calls: number,
 *   ms: number | null, mask: string, asked: string | null, source: string, reason: string | null,
 *   expected?: boolean, kept?: number | null, expected_gain?: number | null, measured_gain?: number | null,
 *   dense?: Record<string, number>
 * }} Row of sparse backends alone: share of the work that was done, what that gains, reason -> calls computed whole
 * @typedef {{
 *   first: number, last: number, steps?: [first: number, last: number] | null,
 *   cells: [row: number, calls: number, ms: number | null, kept?: number][]
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
 *   phrases?: Phrases, probed: string | null, install: { kind: 'command' | 'page' | 'nothing', text: string, note: string } | null
 * }} Backend
 * @typedef {{
 *   platform: Record<string, any>, interpreter: { path: string, python: string, machine: string },
 *   phrases?: Phrases, hint: string | null, auto: string, backends: Backend[]
 * }} Machine
 * @typedef {{
 *   backend: string, kind: 'auto' | 'autotune' | 'named', takes: string | null, accuracy: string | null, source: string,
 *   same: boolean | null, without: string, flag: string, without_accuracy: string,
 *   faster: { backend: string, why: 'not_allowed' | 'not_installed', accuracy: string } | null, tries: string[],
 *   reasons: string[], phrases?: Phrases, package: string, by_model?: boolean, exceptions?: string[]
 * }} Forecast
 * @typedef {{
 *   class_type: string, state: 'waiting' | 'running' | 'done' | 'stopped', outcome: Outcome, step: number | null,
 *   of_steps: number, steps: number, totals: Total[], calls: number, fallbacks: number, offers: string[],
 *   tuning: boolean, ms_per_step: number | null, attention_share: number | null,
 *   saved: { seconds: number, of: number, than: string[] } | null, inputs: Record<string, any>,
 *   models: Record<string, Record<string, any>>, cached: boolean, phrases?: Phrases,
 *   sparse?: { kept: number | null, calls: number, whole: number } | null
 * }} NodeLine of a node that waits, class and state alone
 * @typedef {{ prompt_id: string | null, mark: string | null, nodes: Record<string, NodeLine>, phrases?: Phrases }} NodeLines
 * @typedef {{ value: any, variable: string | null }} MachineSetting
 * @typedef {{
 *   choices: string[], accuracy: string[], guard: string[], roles?: string[], defaults: Record<string, any>, log_levels: string[],
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
  /** @type {Map<string, Promise<Forecast | undefined>>} */
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
    /** @returns {Promise<{ numbering: string, runs: RunSummary[], phrases?: Phrases }>} */
    runs: () => json('runs'),
    /** @returns {Promise<{ numbering: string, run: Run, phrases?: Phrases }>} */
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
    /** @returns {Promise<{ family: string, roles: string[] }>} */
    model: (/** @type {string} */ name) => json(`model?${new URLSearchParams({ name })}`),
    bugReport: async () => (await answer('bug_report')).text(),

    /**
     * What prompts came to on our nodes: of one prompt, or of the last one with a mark.
     *
     * @param {{ prompt_id: string, ended?: 'success' | 'stopped' } | { mark: string }} of
     * @returns {Promise<NodeLines>}
     */
    nodeLines: (of) => json(`node_lines?${new URLSearchParams(Object.entries(of))}`),

    /**
     * What a node will do on this server; undefined where the server does not know the backend. Asked once per page.
     *
     * @param {string} backend
     * @param {string} accuracy
     * @param {string} [model] the name of its file
     * @param {boolean} [recommended] whether the node makes exceptions for it
     */
    forecast(backend, accuracy, model = '', recommended = false) {
      const of = { backend, accuracy, ...(model && { model }), ...(model && recommended && { recommended: '1' }) }
      const query = `${new URLSearchParams(of)}`
      let found = asked.get(query)
      if (!found) {
        found = json(`forecast?${query}`).catch((error) => {
          if (!(error instanceof Refused)) asked.delete(query) // no connection: ask again next time
          return undefined
        })
        asked.set(query, found)
      }
      return found
    },
    /** Forget what `forecast` was told, e.g. after the server was started again. */
    forget,
    /** @param {() => void} tell called whenever that was forgotten */
    onForget: (tell) => void outdated.push(tell)
  }
}

/** @typedef {ReturnType<typeof serverRoutes>} Server */
