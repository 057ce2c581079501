// Runs in ComfyUI's page: loads a graph in API form, lays it out in lanes, and returns what the front end saves and
// the API form that it makes of it, both as JSON text (Playwright itself would turn undefined into null).
async ({ name, nodes, lanes, about }) => {
  const GAP = 50
  const TITLE = 40
  const BELOW = 100 // to the next node of a column: Nodes 2.0 are taller, and have a title and a footer
  const WIDE = {
    PreviewImage: [560, 480], SaveImage: [560, 480], PreviewAny: [760, 260], CLIPTextEncode: [320, 130],
    AttentionConfigText: [370, 240], AttentionBenchmark: [560, 480],
    AttentionBackendSelector: [370, 0] // the title with the words for the search
  }
  const { app } = window
  await app.loadApiJson(nodes, name)
  const graph = app.graph

  for (const node of graph.nodes) {
    for (const widget of node.widgets ?? []) {
      // The front end's default draws a new seed after each run: branches would no longer be equal.
      if (widget.name === 'control_after_generate') widget.value = 'fixed'
    }
    const least = WIDE[node.type] ?? [270, 0]
    const size = node.computeSize()
    node.setSize([Math.max(size[0], least[0]), Math.max(size[1], least[1])])
  }

  // The column of a node is one more than the largest of the nodes in its lane that it takes from.
  const column = (id) => {
    const sources = Object.values(nodes[id].inputs).filter(Array.isArray).map(([source]) => source)
    return Math.max(0, ...sources.filter((source) => lanes[source] === lanes[id]).map((source) => column(source) + 1))
  }
  // Puts a lane's nodes at x, y and a group around them; returns its right and lower ends.
  const place = (lane, x, y) => {
    const columns = []
    for (const id of Object.keys(nodes).filter((id) => lanes[id] === lane)) (columns[column(id)] ??= []).push(id)
    let right = x + GAP / 2
    let low = y
    for (const ids of columns) {
      const members = ids.map((id) => graph.getNodeById(Number(id)))
      let top = y + 2 * TITLE
      for (const node of members) {
        node.pos = [right, top]
        top += node.size[1] + BELOW
      }
      low = Math.max(low, top - BELOW + GAP)
      right += Math.max(...members.map((node) => node.size[0])) + GAP
    }
    const group = new window.LGraphGroup(lane)
    group.pos = [x, y]
    group.size = [right - GAP / 2 - x, low - y]
    graph.add(group)
    return [right - GAP / 2, low]
  }

  const [first, ...others] = [...new Set(Object.values(lanes))]
  const result = others.pop()
  const note = window.LiteGraph.createNode('MarkdownNote')
  note.title = 'About'
  note.setSize([400, 300])
  graph.add(note) // before its text: the front end would give it what a note of this number had in the last graph
  note.widgets[0].value = about
  note.pos = [-note.size[0] - GAP, TITLE]
  const [left] = place(first, 0, 0)
  let low = 0
  let right = left
  for (const lane of others) {
    const end = place(lane, left + GAP, low)
    right = Math.max(right, end[0])
    low = end[1] + GAP
  }
  place(result, right + GAP, 0)

  graph.setDirtyCanvas(true, true)
  const { workflow, output } = await app.graphToPrompt()
  delete workflow.extra.ds // without a view of its own the whole graph is shown when it is opened
  return [JSON.stringify(workflow), JSON.stringify(output)]
}
