/** Elements in one call. Text is always set as text, never as HTML. */

/** @typedef {Node | string | null | undefined | false} Child */

/**
 * Makes an element. Properties in `on` are listeners, `data-*`, `aria-*` and `role` are attributes, the rest are
 * properties of the element.
 *
 * @template {keyof HTMLElementTagNameMap} Tag
 * @param {Tag} tag
 * @param {Record<string, unknown> & { on?: Record<string, (event: any) => void> }} [properties]
 * @param {...Child} children
 * @returns {HTMLElementTagNameMap[Tag]}
 */
export function element(tag, properties = {}, ...children) {
  const made = document.createElement(tag)
  const { on = {}, ...rest } = properties
  for (const [name, value] of Object.entries(rest)) {
    if (value === undefined || value === null) continue
    if (/^(data-|aria-|role$|for$|colspan$|scope$)/.test(name)) made.setAttribute(name, String(value))
    else Reflect.set(made, name, value)
  }
  for (const [name, listener] of Object.entries(on)) made.addEventListener(name, listener)
  made.append(...children.filter((child) => child !== null && child !== undefined && child !== false))
  return made
}

/**
 * Puts new children into an element; focus and scrolling stay with the parts that have the same `data-key`.
 *
 * @param {HTMLElement} parent
 * @param {...Child} children
 */
export function refill(parent, ...children) {
  const active = document.activeElement
  const key = active instanceof HTMLElement && parent.contains(active) ? active.dataset.key : undefined
  const keyed = () => new Map([...parent.querySelectorAll('[data-key]')].map((one) => [one.getAttribute('data-key'), one]))
  const scrolled = [...keyed()].map(([name, { scrollTop, scrollLeft }]) => ({ name, scrollTop, scrollLeft }))
  parent.replaceChildren(...children.filter((child) => child !== null && child !== undefined && child !== false))
  const now = keyed()
  for (const { name, scrollTop, scrollLeft } of scrolled) {
    if (scrollTop || scrollLeft) now.get(name)?.scrollTo(scrollLeft, scrollTop)
  }
  const again = key === undefined ? undefined : now.get(key)
  if (again instanceof HTMLElement) again.focus({ preventScroll: true })
}

/**
 * Offers a text as a file.
 *
 * @param {string} name
 * @param {string} type
 * @param {string} text
 */
export function download(name, type, text) {
  const url = URL.createObjectURL(new Blob([text], { type }))
  element('a', { href: url, download: name }).click()
  setTimeout(() => URL.revokeObjectURL(url), 10_000)
}

/**
 * Copies a text; where the browser keeps the clipboard to https pages, by the old way through a selection.
 *
 * @param {string} text
 * @param {HTMLElement} near an element in whose place a text field may stand for a moment
 * @returns {Promise<boolean>} whether it worked
 */
export async function copy(text, near) {
  try {
    await navigator.clipboard.writeText(text)
    return true
  } catch {
    const field = element('textarea', { value: text, 'aria-hidden': 'true' })
    field.style.position = 'fixed'
    field.style.opacity = '0'
    near.after(field)
    field.select()
    const done = document.execCommand('copy')
    field.remove()
    near.focus()
    return done
  }
}

/**
 * A text with its addresses as links.
 *
 * @param {string} text
 * @returns {Child[]}
 */
export function linked(text) {
  return text.split(/(https?:\/\/[^\s,;()]+)/).map((part, index) =>
    index % 2 ? element('a', { href: part, target: '_blank', rel: 'noopener noreferrer' }, part) : part
  )
}
