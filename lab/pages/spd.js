// Alg. 2 on Himmelblau's function (x^2 + y - 11)^2 + (x + y^2 - 7)^2. Each coordinate is a tensor of its own.
const [START, RATE, BETA1, BETA2, EPS, STEPS] = [[0, -2], 0.6, 0.9, 0.999, 1e-8, 100]

const loss = ([x, y]) => (x * x + y - 11) ** 2 + (x + y * y - 7) ** 2
function gradient([x, y]) {
  const [p, q] = [x * x + y - 11, x + y * y - 7]
  return [4 * x * p + 2 * q, 2 * p + 4 * y * q]
}

function course(lambda, accumulated) {
  const [m, v, c] = [[0, 0], [0, 0], [0, 0]], steps = [{theta: START, c: [0, 0], r: [0, 0]}]
  for (let t = 1; t <= STEPS; t++) {
    const before = steps[t - 1].theta, g = gradient(before), r = []
    const theta = before.map((old, i) => {
      m[i] = BETA1 * m[i] + (1 - BETA1) * g[i]
      v[i] = BETA2 * v[i] + (1 - BETA2) * g[i] * g[i]
      const root = Math.sqrt(v[i]) / Math.sqrt(1 - BETA2 ** t) + EPS
      const after = old - RATE / (1 - BETA1 ** t) * m[i] / root
      c[i] = (accumulated ? c[i] : 0) - g[i] * (old - START[i]) // Eq. (3), or its sum in Alg. 2
      const [near, far] = [Math.abs(old - START[i]), Math.abs(after - START[i])]
      r[i] = far > near ? (far - near) / far : 0 // Eq. (9)
      return c[i] < 0 ? after - lambda * r[i] * (after - START[i]) : after // Eq. (4)
    })
    steps.push({theta, c: [...c], r})
  }
  return steps
}

const MINIMA = [[3, 2], [-2.805118, 3.131312], [-3.77931, -3.283186], [3.584428, -1.848127]]
const side = {from: -5, to: 5, ticks: [-4, -2, 0, 2, 4]}, AXES = {x: {...side, label: "x"}, y: {...side, label: "y"}}

begin(() => {
  const [lambda, t, accumulated] = [+$("lambda").value, +$("t").value, $("condition").value === "paper"]
  const steps = course(lambda, accumulated), now = steps[t], path = steps.slice(0, t + 1).map(s => s.theta)
  draw($("plot"), AXES, [
    ...MINIMA.map(point => ({point, style: "three"})),
    {path: course(0, false).slice(0, t + 1).map(s => s.theta), style: "faint dashed"},
    {path, style: "two"}, {point: START, style: "faint", label: "start"}, {point: now.theta, style: "two", r: 7},
  ])
  show(2, {"show-lambda": lambda, x: now.theta[0], y: now.theta[1], loss: loss(now.theta)})
  const far = Math.hypot(now.theta[0] - START[0], now.theta[1] - START[1])
  show(3, {cx: now.c[0], cy: now.c[1], rx: now.r[0], ry: now.r[1], far})
  show(0, {"show-t": t, fired: steps.slice(1, t + 1).flatMap(s => s.c).filter(c => c < 0).length})
})
