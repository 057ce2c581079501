() => {
  // Links whose drawn path enters the frame of a node; a slot lies 10 px inside of its node.
  const INSIDE = 16
  const BULGE = 80 // how far a curve may leave the box around its ends
  const { canvas, graph } = window.app
  canvas.draw(true, true)
  const context = document.createElement('canvas').getContext('2d')
  context.lineWidth = 4
  const ends = (link) => {
    const places = []
    for (let one = graph.reroutes.get(link.parentId); one; one = graph.reroutes.get(one.parentId)) places.unshift(one)
    const start = graph.getNodeById(link.origin_id).getOutputPos(link.origin_slot)
    const end = graph.getNodeById(link.target_id).getInputPos(link.target_slot)
    const along = [start, ...places.map((one) => one.pos), end]
    return [...places, link].map((one, at) => [one.path, along[at], along[at + 1]])
  }
  const frames = graph.nodes.map((node) => {
    const [x, y, width, height] = node.getBounding()
    return { node, box: [x + INSIDE, y + INSIDE, x + width - INSIDE, y + height - INSIDE] }
  })
  const found = []
  for (const link of graph.links.values()) {
    for (const [path, from, to] of ends(link)) {
      for (const { node, box: [left, top, right, low] } of frames) {
        const near = (axis, least, most) =>
          Math.max(from[axis], to[axis]) + BULGE > least && Math.min(from[axis], to[axis]) - BULGE < most
        if (!near(0, left, right) || !near(1, top, low)) continue
        const points = []
        for (let x = left; x <= right; x += 4) points.push([x, top], [x, low])
        for (let y = top; y <= low; y += 4) points.push([left, y], [right, y])
        if (points.some(([x, y]) => context.isPointInStroke(path, x, y))) {
          found.push([link.origin_id, link.target_id].map((id) => graph.getNodeById(id).title).join(' > ') + ' behind ' + node.title)
        }
      }
    }
  }
  return found
}
