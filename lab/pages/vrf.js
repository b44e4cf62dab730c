// Eqs. (1), (5), (6) over the samples of one run. A sample is right where FT's weight lies between its
// two ends; those for which the weight does not matter are only counted.
const SETS = DATA.sets, SHIFTS = Object.keys(SETS).filter(name => name !== "val" && name !== "test")

const weight = (d, a, b) => 1 / (1 + Math.exp((d - a) / b)) // Eq. (6)

function accuracy(set, weightOf) {
  let right = set.always
  for (let i = 0; i < set.d.length; i++) {
    const w = weightOf(set.d[i] / 1e4)
    if (set.low[i] / 1e4 <= w && w <= set.high[i] / 1e4) right++
  }
  return 100 * right / set.n
}

function scores(weightOf) {
  const shift = SHIFTS.reduce((sum, name) => sum + accuracy(SETS[name], weightOf), 0) / SHIFTS.length
  return {id: accuracy(SETS.test, weightOf), shift, val: accuracy(SETS.val, weightOf)}
}

const CURVE = Array.from({length: 51}, (_, i) => scores(() => i / 50))
const AXES = {
  x: {label: "ID accuracy, %", from: 76, to: 96, ticks: [76, 80, 84, 88, 92, 96]},
  y: {label: "mean accuracy under shift, %", from: 66, to: 82, ticks: [66, 70, 74, 78, 82]},
}

begin(() => {
  const [alpha, a, b] = ["alpha", "a", "b"].map(id => +$(id).value)
  const ose = scores(() => alpha), vrf = scores(d => weight(d, a, b))
  draw($("plot"), AXES, [
    {path: CURVE.map(of => [of.id, of.shift]), style: "one"},
    {point: [CURVE[0].id, CURVE[0].shift], style: "faint", label: "zero-shot"},
    {point: [CURVE[50].id, CURVE[50].shift], style: "faint", label: "FT"},
    {point: [ose.id, ose.shift], style: "one", label: "OSE", r: 7},
    {point: [vrf.id, vrf.shift], style: "two", label: "VRF", r: 7},
  ])
  show(2, {"show-alpha": alpha, "show-a": a, "show-b": b})
  for (const part of ["id", "shift", "val"]) show(1, {[`ose-${part}`]: ose[part], [`vrf-${part}`]: vrf[part]})
})
