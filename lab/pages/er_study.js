// The baseline of Sec. 3 and App. A in logits, and what a run has above it at each checkpoint.
const logit = p => Math.log(p / (1 - p)), percent = (k, n) => 100 * k / n
const beta = p => 1 / (1 + Math.exp(-(DATA.slope * logit(p) + DATA.intercept)))
const [N_ID, N_OOD] = DATA.n, point = (id, ood) => [percent(id, N_ID), percent(ood, N_OOD)]
const side = {from: 2, to: 98, ticks: [2, 5, 10, 20, 50, 80, 90, 95], at: p => logit(p / 100)}
const AXES = {x: {...side, label: "ID accuracy, %"}, y: {...side, label: `accuracy on ${DATA.shift}, %`}}
const LINE = Array.from({length: 97}, (_, i) => [2 + i, 100 * beta((2 + i) / 100)])

$("run").innerHTML = Object.keys(DATA.runs).map(name => `<option>${name}</option>`).join("")
begin(() => {
  const run = DATA.runs[$("run").value], last = run.step.length - 1
  $("checkpoint").max = last
  const i = Math.min(+$("checkpoint").value, last), [id, ood] = point(run.k_id[i], run.k_ood[i])
  const expected = 100 * beta(id / 100)
  draw($("plot"), AXES, [
    ...DATA.testbed.map(k => ({point: point(...k), style: "faint", r: 3})),
    {path: LINE, style: "faint"},
    {path: run.step.map((_, j) => point(run.k_id[j], run.k_ood[j])), style: "one"},
    {path: [[id, expected], [id, ood]], style: "two"},
    {point: [id, ood], style: "one", r: 7, label: `ER ${(ood - expected).toFixed(1)}`},
  ])
  show(0, {step: run.step[i]})
  show(1, {id, ood, beta: expected, er: ood - expected})
})
