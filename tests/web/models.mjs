/** The file of a node's model, found in graphs as the front end has them: run by tests/browser/test_web.py. */

import assert from 'node:assert'
import { modelOf, valueIn } from '../../web/model_of.js'

const [MUTED, BYPASSED] = [2, 4]
const FILE = 'wan.safetensors'

/** @param {Record<string, any>} nodes by id: class, inputs as [type, node, output], widgets, mode */
function graphOf(nodes, around = {}) {
  const graph = { ...around, nodes: [], links: new Map(), getLink: (id) => graph.links.get(id) }
  graph.getNodeById = (id) => graph.nodes.find((one) => String(one.id) === String(id)) ?? null
  for (const [id, { type, inputs = [], widgets = {}, ...rest }] of Object.entries(nodes)) {
    const node = { id, type, graph, mode: 0, ...rest }
    node.widgets = Object.entries(widgets).map(([name, value]) => ({ name, value }))
    node.inputs = inputs.map(([kind, from, output, widget], slot) => {
      const link = from === undefined ? undefined : graph.links.size + 1
      if (link) graph.links.set(link, { id: link, origin_id: from, origin_slot: output ?? 0, target_id: id, target_slot: slot })
      return { type: kind, name: widget ?? kind.toLowerCase(), link, ...(widget && { widget: { name: widget } }) }
    })
    node.getInputLink = (slot) => graph.links.get(node.inputs[slot].link)
    graph.nodes.push(node)
  }
  return graph
}

const subgraph = (nodes, output) => {
  const graph = graphOf(nodes)
  graph.links.set('out', { origin_id: output[0], origin_slot: output[1] ?? 0 })
  graph.outputs = [{ linkIds: ['out'] }]
  return graph
}

const found = (nodes, id = 'end', subgraphs = []) => {
  const root = graphOf(nodes)
  root.subgraphs = new Map(subgraphs.map((one, index) => [index, one]))
  return modelOf(root.getNodeById(id), root)
}

const loader = (mode = 0) => ({ type: 'UNETLoader', mode, widgets: { unet_name: FILE, weight_dtype: 'default' } })
const lora = (from, mode = 0) => ({
  type: 'LoraLoaderModelOnly', mode, inputs: [['MODEL', from]], widgets: { lora_name: 'style.safetensors' }
})
const end = (from, output) => ({ type: 'PerRoleAttentionConfig', inputs: [['MODEL', from, output]] })
const set = (from, name = 'm', type = 'SetNode') => ({ type, inputs: [['MODEL', from]], widgets: { Constant: name } })
const get = (name = 'm', type = 'GetNode') => ({ type, widgets: { Constant: name } })

// Patches, reroutes, and what is switched off.
assert.equal(found({ a: loader(), b: lora('a'), end: end('b') }), FILE)
assert.equal(found({ a: loader(), b: { type: 'Reroute', inputs: [['*', 'a']] }, end: end('b') }), FILE)
assert.equal(found({ a: loader(), b: lora('a', BYPASSED), end: end('b') }), FILE)
assert.equal(found({ a: loader(BYPASSED), end: end('a') }), '')
assert.equal(found({ a: loader(), b: lora('a', MUTED), end: end('b') }), '')
assert.equal(found({ end: end() }), '')
assert.equal(found({ a: lora('end'), end: end('a') }), '') // a circle
const two = { type: 'AttentionBackendSelector', inputs: [['MODEL', 'a'], ['MODEL', 'b']] }
const low = { ...loader(), widgets: { unet_name: 'low.safetensors' } }
assert.equal(found({ a: loader(), b: low, s: two, end: end('s', 1) }), 'low.safetensors')
assert.equal(found({ a: loader(), b: low, s: { ...two, mode: BYPASSED }, end: end('s', 1) }), 'low.safetensors')

// Setters and getters, which are connected by name.
assert.equal(found({ a: loader(), s: set('a'), g: get(), end: end('g') }), FILE)
assert.equal(found({ a: loader(), s: set('a'), g: get(), b: lora('g'), t: set('b', 'n'), h: get('n'), end: end('h') }), FILE)
assert.equal(found({ a: loader(), s: set('a', 'other'), g: get(), end: end('g') }), '')
assert.equal(found({ a: loader(), s: set('a', ''), g: get(''), end: end('g') }), '')
assert.equal(found({ s: set('g'), g: get(), end: end('g') }), '')
assert.equal(found({ a: loader(), s: set('a', 'm', 'easy setNode'), g: get('m', 'easy getNode'), end: end('g') }), FILE)

// Subgraphs: a loader inside, one with its file chosen outside, a model that goes through, and a node inside.
const inside = subgraph({ a: loader(), b: lora('a') }, ['b'])
const box = (graph, rest = {}) => ({ type: 'box', subgraph: graph, ...rest })
assert.equal(found({ s: box(inside), end: end('s') }, 'end', [inside]), FILE)
assert.equal(found({ s: box(inside, { mode: BYPASSED }), end: end('s') }, 'end', [inside]), '')
assert.equal(found({ s: box(inside, { mode: MUTED }), end: end('s') }, 'end', [inside]), '')
const asked = { ...loader(), inputs: [['COMBO', '-10', 0, 'unet_name']] }
const promoted = subgraph({ a: asked }, ['a'])
const boxes = (name) => box(promoted, { inputs: [['COMBO', undefined, 0, 'unet_name']], widgets: { unet_name: name } })
const pair = { s: boxes('one.sft'), t: boxes('two.sft'), end: end('t'), first: end('s') }
assert.equal(found(pair, 'end', [promoted]), 'two.sft')
assert.equal(found(pair, 'first', [promoted]), 'one.sft')
const nested = subgraph({ s: box(promoted, { inputs: [['COMBO', '-10', 0, 'unet_name']] }) }, ['s'])
nested.nodes[0].widgets = [{ name: 'unet_name', value: 'inner.sft' }]
const outer = box(nested, { inputs: [['COMBO', undefined, 0, 'unet_name']], widgets: { unet_name: 'outer.sft' } })
assert.equal(found({ s: outer, end: end('s') }, 'end', [promoted, nested]), 'outer.sft')
const through = subgraph({ b: lora('-10') }, ['b'])
const passed = (mode = 0) => box(through, { mode, inputs: [['MODEL', 'a']] })
assert.equal(found({ a: loader(), s: passed(), end: end('s') }, 'end', [through]), FILE)
assert.equal(found({ a: loader(), s: passed(BYPASSED), end: end('s') }, 'end', [through]), FILE)
const root = graphOf({ a: loader(), s: passed() })
root.subgraphs = new Map([['through', through]])
assert.equal(modelOf(through.nodes[0], root), FILE)

// The value of a widget in a prompt.
const both = graphOf(pair)
both.subgraphs = new Map([['promoted', promoted]])
const [asks] = promoted.nodes
assert.equal(valueIn(asks, asks.widgets[0], both), 'one.sft')
assert.equal(valueIn(asks, asks.widgets[0], both, [both.getNodeById('t')]), 'two.sft')
assert.equal(valueIn(asks, asks.widgets[1], both), 'default')
console.log('works')
