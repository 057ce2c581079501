/** The pack in ComfyUI's front end: tab, lines on nodes, settings, command. Without it every node works as well. */

import { api } from '../../scripts/api.js'
import { app } from '../../scripts/app.js'
import { nodeLines } from './node_line.js'
import { openPanel } from './panel.js'
import { suggestRoles } from './role_list.js'
import { seed, showInWords } from './seeds.js'
import { serverRoutes } from './server.js'
import { settings } from './settings.js'
import { loadWords } from './words.js'

const TAB = 'attention-backends'
const SHOW = 'AttentionBackends.ShowReport'

const server = serverRoutes(api)
const language = app.extensionManager?.setting?.get?.('Comfy.Locale') ?? 'en'
const [say, found] = await Promise.all([loadWords(api, String(language)), server.settings().catch(() => null)])
const lines = nodeLines(app, api, server, say)

suggestRoles(app, server, found?.roles ?? [])

/** @type {ReturnType<typeof openPanel> | undefined} */
let panel

/** @type {import('@comfyorg/comfyui-frontend-types').ComfyExtension} */
const extension = {
  name: 'AttentionBackends',
  settings: settings(found, server, say),
  commands: [
    {
      id: SHOW,
      label: say('command.show'),
      icon: 'pi pi-bolt',
      function: async () => {
        if (panel?.element.isConnected) return
        await app.extensionManager?.command?.execute?.(`Workspace.ToggleSidebarTab.${TAB}`)
      }
    }
  ],
  // The front end goes by what a key types, which for these on a Mac is the second one.
  keybindings: ['a', 'Å'].map((key) => ({ commandId: SHOW, combo: { key, alt: true, shift: true } })),
  menuCommands: [{ path: ['View'], commands: [SHOW] }],
  aboutPageBadges: [
    { label: say('about.badge'), url: api.apiURL('/attention_backends/bug_report'), icon: 'pi pi-bolt' }
  ],
  setup() {
    if (!app.extensionManager?.registerSidebarTab) return // an older front end has no such tabs
    app.extensionManager.registerSidebarTab({
      id: TAB,
      icon: 'pi pi-bolt',
      title: say('panel.title'),
      tooltip: say('panel.tooltip'),
      type: 'custom',
      render(place) {
        if (panel?.element.parentElement === place) return // the front end renders the same place again and again
        panel?.close()
        panel = openPanel(place, api, server, say, lines.titlesOf)
      },
      destroy() {
        panel?.close()
        panel = undefined
      }
    })
  },
  nodeCreated(node) {
    const setting = app.extensionManager?.setting
    if (setting?.get) seed(node, app.configuringGraph, (id) => setting.get(id))
    showInWords(node, say)
    lines.watch(node)
  }
}

app.registerExtension(extension)
