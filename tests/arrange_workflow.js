// Runs in ComfyUI's page: loads a graph in API form, lays it out in columns, and returns what the front end saves and
// the API form that it makes of it, both as JSON text (Playwright itself would turn undefined into null).
async ({ name, nodes, columns, folded, fixed, models, about }) => {
  const TITLE = 30
  const ABOVE = 50 // free height between two nodes of a column, where links pass; Nodes 2.0 are taller, too
  const BESIDE = 54 // free width between two columns
  const WIDTH = {
    AttentionBackendSelector: 340, AttentionCompare: 400, AttentionConfigText: 340, AttentionBenchmark: 420,
    PreviewAny: 420, PreviewImage: 420, SaveImage: 320, SaveVideo: 320
  }
  const FOLDED = 200
  const HEIGHT = {
    CLIPTextEncode: 110, PreviewImage: 380, SaveImage: 330, SaveVideo: 330, PreviewAny: 240, AttentionConfigText: 240,
    AttentionBenchmark: 380
  }
  const ROOM = { AttentionBackendSelector: 50 } // below it, for its line on what runs
  const { app } = window
  await app.loadApiJson(nodes, name)
  const graph = app.graph
  const node = (id) => graph.getNodeById(Number(id))

  for (const id of Object.keys(nodes)) {
    for (const widget of node(id).widgets ?? []) {
      // It is named control_after_generate, or, in a node that gives it a value, after that value.
      if (['fixed', 'randomize'].includes(widget.value)) widget.value = fixed.includes(id) ? 'fixed' : 'randomize'
    }
    if (models[id]) node(id).properties.models = models[id] // where the front end offers to get them
    const size = node(id).computeSize()
    const { type } = node(id)
    node(id).setSize([Math.max(size[0], WIDTH[type] ?? 270), Math.max(size[1], HEIGHT[type] ?? 0)])
    if (folded.includes(id)) node(id).collapse()
  }
  const note = window.LiteGraph.createNode('MarkdownNote')
  note.title = 'About'
  note.setSize([270, 150])
  graph.add(note) // before its text: the front end would give it what a note of this number had in the last graph
  note.widgets[0].value = about

  // Columns from left to right; in each, nodes from the top.
  const tall = (one) => (one.flags.collapsed ? 0 : one.size[1])
  const lanes = []
  for (const id of Object.keys(nodes)) (lanes[columns[id]] ??= []).push(node(id))
  lanes[0].push(note)
  let x = 0
  const edges = lanes.map((lane) => {
    const width = Math.max(...lane.map((one) => (one.flags.collapsed ? FOLDED : one.size[0])))
    let y = TITLE
    const gaps = [y - TITLE - 20]
    for (const one of lane) {
      one.pos = [x, y]
      if (!one.flags.collapsed) one.setSize([width, one.size[1]])
      const low = y + tall(one) + (ROOM[one.type] ?? 0)
      gaps.push(low + ABOVE / 2)
      y = low + ABOVE + TITLE
    }
    const edge = { left: x, right: x + width, gaps, used: gaps.map(() => 0) }
    x += width + BESIDE
    return edge
  })

  // A link that leaves its column for another than the next one passes between nodes, not behind them.
  const column = (one) => lanes.findIndex((lane) => lane.includes(one))
  for (const link of [...graph.links.values()]) {
    const [from, to] = [graph.getNodeById(link.origin_id), graph.getNodeById(link.target_id)]
    const [start, end] = [from.getOutputPos(link.origin_slot), to.getInputPos(link.target_slot)]
    let y = start[1]
    const free = ({ gaps, used }, at) => gaps[at] + [0, 8, -8, 16, -16][used[at]++ % 5]
    const passes = (edge, at, backwards) => {
      y = free(edge, at)
      const ends = [[edge.left - 18, y], [edge.right + 18, y]]
      for (const place of backwards ? ends.reverse() : ends) graph.createReroute(place, link)
    }
    const [first, last] = [column(from), column(to)]
    if (last < first) throw new Error(`${name}: ${to.type} stands left of ${from.type}, which it takes from`)
    if (last === first) {
      const [above, at] = [lanes[first].indexOf(from), lanes[first].indexOf(to)]
      // A folded node is not as wide as those between it and the one that takes from it.
      if (at > above + 1) graph.createReroute([edges[first].right + 18, free(edges[first], above + 1)], link)
      passes(edges[first], at, true)
    }
    for (let at = first + 1; at < last; at++) {
      const aim = y + (end[1] - y) / (last - at + 1)
      const distances = edges[at].gaps.map((gap) => Math.abs(gap - aim))
      passes(edges[at], distances.indexOf(Math.min(...distances)), false)
    }
  }

  graph.setDirtyCanvas(true, true)
  const { workflow, output } = await app.graphToPrompt()
  for (const { inputs = [] } of workflow.nodes) for (const input of inputs) delete input.label // it is in one language
  workflow.extra.ds = { scale: 1, offset: [70, 70] } // opened as a file: the loaders at 100 %, left of them the toolbar
  return [JSON.stringify(workflow), JSON.stringify(output)]
}
