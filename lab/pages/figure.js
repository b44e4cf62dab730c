// What the moving parts share. axes: {x, y}, each {label, ticks, from, to, at}; at: value -> axis.
// marks: {path: [[x, y], ...], style} or {point: [x, y], style, label, r}, in the data's numbers.
"use strict"
const $ = id => document.getElementById(`live-${id}`)
const DATA = JSON.parse($("data").textContent)
const [WIDTH, HEIGHT, LEFT, BOTTOM, EDGE] = [640, 420, 56, 44, 14]

function draw(svg, {x, y}, marks) {
  const share = (value, {from, to, at = v => v}) => (at(value) - at(from)) / (at(to) - at(from))
  const place = ([a, b]) => [LEFT + share(a, x) * (WIDTH - LEFT - EDGE),
    HEIGHT - BOTTOM - share(b, y) * (HEIGHT - BOTTOM - EDGE)].map(v => v.toFixed(1))
  const path = (points, style) => `<path class="${style}" d="M${points.map(p => place(p).join(" ")).join("L")}"/>`
  const words = ([a, b], right, down, anchor, text) =>
    `<text x="${+a + right}" y="${+b + down}" text-anchor="${anchor}">${text}</text>`
  let out = words([(LEFT + WIDTH) / 2, HEIGHT], 0, -6, "middle", x.label)
  for (const t of x.ticks) out += path([[t, y.from], [t, y.to]], "grid") + words(place([t, y.from]), 0, 17, "middle", t)
  for (const t of y.ticks) out += path([[x.from, t], [x.to, t]], "grid") + words(place([x.from, t]), -6, 4, "end", t)
  out += `<g transform="rotate(-90)">${words([(BOTTOM - HEIGHT) / 2, 14], 0, 0, "middle", y.label)}</g>`
  for (const m of marks) {
    if (m.path) out += path(m.path, m.style)
    else {
      const [a, b] = place(m.point)
      out += `<circle class="${m.style}" cx="${a}" cy="${b}" r="${m.r || 4}"/>`
      if (m.label) out += words([a, b], 10, -8, "start", m.label)
    }
  }
  svg.setAttribute("viewBox", `0 0 ${WIDTH} ${HEIGHT}`)
  svg.innerHTML = out
}

// Writes numbers {id: value} to be read, and in full for the tests.
function show(digits, numbers) {
  for (const [id, value] of Object.entries(numbers)) {
    $(id).textContent = value.toFixed(digits)
    $(id).dataset.exact = value
  }
}

// Calls `update` now and whenever a slider or a choice moves.
function begin(update) {
  for (const input of document.querySelectorAll(".live input, .live select")) input.oninput = update
  update()
}
