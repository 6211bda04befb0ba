"use strict";
// The decision again, for whatever the controls say: the same equations as fewbit.predict.step and rates, fewbit.decide.timing, memory and
// choose, on the numbers of the scene. Times in milliseconds.
const pageData = JSON.parse(document.getElementById("scene").textContent);
const C = pageData.constants;

function copiesRead(group, tokens) {
  const chosen = group.count / group.copies;
  return chosen < 1 ? group.copies * (1 - (1 - chosen) ** tokens) : group.copies;
}

function linearWork(cell, option, index, tokens) {
  const group = cell.groups[index], weights = group.rows * group.columns;
  const path = group.quantizable && option.weights !== "BF16" ? option.path : "dense";
  const read = copiesRead(group, tokens), packed = option.stored[index] * read, rows = tokens * group.count;
  let copies = 0;
  if (path === "unfused") {
    copies = 4 * weights * read;
    if (option.quantizesInputs) copies += 4 * rows * group.columns;
  } else if (path === "native") copies = rows * group.columns * 3;
  return {
    weight: packed, activation: 2 * rows * (group.rows + group.columns), copy: copies, cache: 0,
    operations: 2 * weights * rows, bits: 8 * packed / (weights * read),
    format: path === "native" ? option.format : "bf16",
    unpacked: path === "fused" && tokens > C.gemvRows ? weights * read * Math.ceil(tokens / C.unpackRows) : 0,
    operators: group.launches * (path === "unfused" ? 2 : 1),
    weights: weights * read, columns: group.columns, kernel: path === "fused" || path === "native" ? option.weights : "BF16",
  };
}

function cacheBytes(cell, name, tokens) {
  const cache = cell.caches[name];
  return cell.kv.reduce((sum, kv, i) => {
    const kept = kv.window === null ? tokens : Math.min(tokens, kv.window), newest = Math.min(cache.recent, kept);
    return sum + (kept - newest) * cache.perToken[i] + newest * cache.plain[i];
  }, 0);
}

function seen(fresh, before, window) {
  if (window === null || before + fresh <= window) return fresh * before + fresh * (fresh + 1) / 2;
  const growing = Math.max(0, Math.min(fresh, window - before));
  return growing * before + growing * (growing + 1) / 2 + (fresh - growing) * window;
}

function stepWork(cell, option, phase, batch, context) {
  const tokens = batch * (phase === "prefill" ? context : 1);
  const works = cell.groups.map((group, i) => linearWork(cell, option, i, group.head ? batch : tokens));
  if (cell.kv.length) {
    const [fresh, before] = phase === "prefill" ? [context, 0] : [1, context];
    const operations = cell.kv.reduce((sum, kv) => sum + 4 * kv.layers * cell.heads * kv.headDim * seen(fresh, before, kv.window), 0);
    const units = cell.kv.map(kv => batch * kv.layers * kv.heads * seen(fresh, before, kv.window));
    works.push({
      attention: true, units, rate: `${phase} ${option.cache}`, weight: 0, activation: 0, copy: 0, cache: batch * cacheBytes(cell, option.cache, before + fresh),
      operations: batch * operations, bits: 16, format: "bf16", unpacked: 0, operators: cell.depth,
    });
  }
  const counted = works.reduce((sum, work) => sum + work.operators, 0);
  works.push({ weight: 0, activation: 0, copy: 0, cache: 0, operations: 0, bits: 16, format: "bf16", unpacked: 0,
    operators: Math.max(cell.operators - counted, 0) });
  return works;
}

function readSpeed(bits, f) {
  if (bits >= 16) return 1;
  if (bits >= 8) return 1 + (16 - bits) / 8 * (f.read_8 - 1);
  return f.read_8 + (8 - Math.max(bits, 4)) / 4 * (f.read_4 - f.read_8);
}

function factorsOf(logs) {
  return Object.fromEntries(C.factors.map((name, i) => [name, Math.exp(logs[i])]));
}

function bySheet(cell, work, f) {
  const bandwidth = cell.bandwidth * 1e6, peak = (cell.dense[work.format] ?? cell.dense.bf16) * 1e9;
  const compute = f.compute * (work.format !== "bf16" ? f.native : 1);
  const moving = work.weight / (f.memory * readSpeed(work.bits, f) * bandwidth) + work.activation / (f.memory * bandwidth)
    + work.cache / (f.cache * bandwidth);
  const computing = work.operations / (compute * peak) + work.unpacked * C.unpackOperations / (f.unpack * cell.vector * 1e9);
  const floor = Math.max((work.weight + work.cache) / bandwidth, work.operations / peak);
  return { moving, computing, busy: Math.max(moving, computing), copying: work.copy / (f.copy * bandwidth), floor };
}

// Between neighbouring points [x, y]; beyond them with the slope of the first to the last.
function line(points, at) {
  const last = points.length - 1, outside = at < points[0][0] || at > points[last][0];
  const index = Math.min(Math.max(points.filter(([x]) => x < at).length, 1), last);
  const [[x0, y0], [x1, y1]] = outside ? [points[0], points[last]] : [points[index - 1], points[index]];
  return y0 + (y1 - y0) * (at - x0) / (x1 - x0);
}

// In the logarithms; flat below the first, in proportion beyond the last.
function interpolated(tokens, times, at) {
  const last = tokens.length - 1;
  if (at >= tokens[last]) return times[last] * at / tokens[last];
  if (at <= tokens[0]) return times[0];
  return Math.exp(line(tokens.map((count, i) => [Math.log(count), Math.log(times[i])]), Math.log(at)));
}

// A machine whose kernels were measured: picoseconds per weight of the very kernel, split into memory and the rest.
function byRates(cell, work, f) {
  const rates = cell.rates, bandwidth = cell.bandwidth * 1e6;
  if (!rates) return null;
  if (work.attention) {
    const ns = rates.attention[work.rate];
    if (!ns) return null;
    const busy = work.units.reduce((sum, units, i) => sum + units * ns[i], 0) / 1e6 / f.cache, moving = work.cache / bandwidth;
    return { moving, computing: busy > 2 * moving ? busy : 0, busy, copying: 0, floor: moving };
  }
  const kernel = work.kernel && rates.kernels[work.kernel];
  if (!kernel) return null;
  const tokens = work.operations / (2 * work.weights);
  const points = kernel.measured.map(one => [1 / one.columns, interpolated(one.tokens, one.ps, tokens)]);
  const least = Math.min(...points.map(([, ps]) => ps));
  const whole = points.length === 1 ? points[0][1] : Math.max(line(points, 1 / work.columns), C.leastShare * least);
  const memory = Math.min(kernel.bits / 8 * 1e3 / rates.bandwidth, whole), rest = Math.sqrt(whole ** 2 - memory ** 2);
  const speed = readSpeed(work.bits, f), compute = f.compute * (work.format !== "bf16" ? f.native : 1);
  const moving = work.weights * memory * rates.bandwidth / cell.bandwidth / 1e9 / speed / f.memory;
  const computing = work.weights * rest / 1e9 / speed / compute;
  const copying = work.activation / C.activationBytes * rates.nsPerActivation / 1e6 + work.copy / (f.copy * bandwidth);
  const floor = Math.max(work.weight / bandwidth, work.operations / (kernel.peak * 1e9));
  return { moving, computing, busy: Math.hypot(moving, computing), copying, floor };
}

function stepTime(cell, works, f) {
  const shares = { bandwidth: 0, compute: 0, overhead: 0 };
  let total = 0, floor = 0;
  for (const work of works) {
    const parts = byRates(cell, work, f) ?? bySheet(cell, work, f), launching = work.operators * f.operator_us / 1e3;
    shares[parts.computing > parts.moving ? "compute" : "bandwidth"] += parts.busy;
    shares.bandwidth += parts.copying;
    shares.overhead += launching;
    floor += parts.floor;
    total += parts.busy + parts.copying + launching;
  }
  return { total, floor, bound: Object.keys(shares).reduce((a, b) => (shares[b] > shares[a] ? b : a)) };
}

// A sum of steps, [[how often, works], ...], with what its logarithm does at the points around the mean (fewbit.decide.timing).
function timeOf(cell, steps) {
  const log = logs => Math.log(steps.reduce((sum, [count, works]) => sum + count * stepTime(cell, works, factorsOf(logs)).total, 0));
  const middle = log(cell.mean), h = C.step, moved = (column, side) => cell.mean.map((value, j) => value + side * h * column[j]);
  const ends = cell.root.map(column => [log(moved(column, 1)), log(moved(column, -1))]);
  const deviations = [...ends.map(([up, down]) => (up - down) / (2 * h)),
    ...ends.map(([up, down]) => (up + down - 2 * middle) * Math.sqrt(h * h - 1) / (2 * h * h))];
  const parts = steps.map(([count, works]) => ({ count, ...stepTime(cell, works, factorsOf(cell.mean)) }));
  return { ms: Math.exp(middle), deviations, steps, parts, sd: spread(cell, deviations, 1) };
}

function spread(cell, deviations, residuals) {
  return Math.sqrt(deviations.reduce((sum, one) => sum + one * one, residuals * cell.residual ** 2));
}

function interval(value, sd) {
  const factor = Math.exp(C.z90 * sd);
  return { value, low: value / factor, high: value * factor };
}

function linears(timed) {
  return JSON.stringify(timed.steps.map(([, works]) => works.filter(work => !work.attention)));
}

function ratioOf(cell, slow, fast) {
  if (JSON.stringify(slow.steps) === JSON.stringify(fast.steps)) return { value: 1, low: 1, high: 1 };
  const residuals = linears(slow) === linears(fast) ? 0 : 2;
  return interval(slow.ms / fast.ms, spread(cell, slow.deviations.map((one, i) => one - fast.deviations[i]), residuals));
}

function within(timed, limit) {  // probability, with the error function of Abramowitz and Stegun 7.1.26
  const x = Math.log(limit / timed.ms) / Math.max(timed.sd, 1e-9) / Math.SQRT2, t = 1 / (1 + 0.3275911 * Math.abs(x));
  const tail = t * (0.254829592 + t * (-0.284496736 + t * (1.421413741 + t * (-1.453152027 + t * 1.061405429)))) * Math.exp(-x * x);
  return 0.5 * (1 + Math.sign(x) * (1 - tail));
}

function memoryOf(cell, option, at) {
  const cache = at.batch * cacheBytes(cell, option.cache, at.prompt + at.newTokens);
  const atOnce = Math.max(at.batch, Math.min(at.batch * at.prompt, C.chunkTokens));
  const work = atOnce * cell.workspacePerToken + at.batch * cell.workspacePerSequence;
  const total = option.weightBytes + cache + work + cell.reserved;
  return { total, cache, fits: total <= cell.capacity };
}

function relation(cell, slow, fast) {
  const ratio = ratioOf(cell, slow.objective, fast.objective);
  if (ratio.value < (slow.weights === fast.weights ? C.minCacheGain : C.minGain)) return "equal";
  return ratio.low > 1 ? "faster" : "unknown";
}

// at: batch, prompt, newTokens, goal, bandwidth, cacheBits (0: any).
function decide(scene, at) {
  const cell = { ...scene, bandwidth: at.bandwidth }, limits = scene.workload, middle = at.prompt + Math.floor(at.newTokens / 2);
  const rows = scene.options.map(option => {
    const row = { ...option, memory: memoryOf(cell, option, at), reason: option.obstacle, status: "rejected", acceptable: false };
    if (!option.path) return row;
    const one = stepWork(cell, option, "prefill", 1, at.prompt), all = stepWork(cell, option, "prefill", at.batch, at.prompt);
    const step = stepWork(cell, option, "decode", at.batch, middle);
    row.first = timeOf(cell, [[1, one]]);
    row.step = timeOf(cell, [[1, step]]);
    row.batch = timeOf(cell, [[1, all], [at.newTokens, step]]);
    row.objective = at.goal === "latency" ? timeOf(cell, [[1, one], [at.newTokens, step]]) : row.batch;
    row.tokensPerSecond = 1e3 * at.batch * at.newTokens / row.batch.ms;
    const bits = Number((option.cache.match(/\d+$/) ?? ["16"])[0]);
    if (!row.memory.fits) row.reason = `does not fit: ${gb(row.memory.total)} of ${gb(cell.capacity)}`;
    else if (option.verdict !== "pass")
      row.reason = `${option.verdict === "fail" ? "fails" : "unknown"} in quality: passes with a probability of ${percent(option.probability)}`;
    else if (limits.maxTtftMs !== null && within(row.first, limits.maxTtftMs) < C.confidence) row.reason = "time to the first token above the limit";
    else if (limits.maxMsPerToken !== null && within(row.step, limits.maxMsPerToken) < C.confidence) row.reason = "time per token above the limit";
    else if (at.cacheBits && bits !== at.cacheBits) row.reason = `another cache than the ${at.cacheBits}-bit one that was asked for`;
    else row.acceptable = true;
    return row;
  });
  const acceptable = rows.filter(row => row.acceptable);
  const fastest = acceptable.reduce((best, row) => (!best || row.objective.ms < best.objective.ms ? row : best), null);
  if (!fastest) return { cell, rows, chosen: null, undecided: [], verdict: "not feasible" };
  const better = acceptable.filter(row => row.loss < fastest.loss).sort((a, b) => a.loss - b.loss);
  const chosen = better.find(row => relation(cell, row, fastest) === "equal") ?? fastest;
  const undecided = better.filter(row => row.loss < chosen.loss && relation(cell, row, chosen) === "unknown");
  for (const row of acceptable) {
    const ratio = ratioOf(cell, row.objective, chosen.objective);
    row.status = row === chosen ? "chosen" : undecided.includes(row) ? "undecided" : "rejected";
    row.reason = row === chosen ? "" : undecided.includes(row) ? `may be as fast: ${times(ratio)}`
      : ratio.value < 1 ? `${figure(1 / ratio.value)}x as fast, not worth its loss` : `slower: the choice is ${times(ratio)} as fast`;
  }
  const plain = chosen.weights === "BF16" && chosen.cache === "BF16";
  return { cell, rows, chosen, undecided, verdict: undecided.length ? "abstain" : plain ? "do not quantize" : "quantize" };
}

// ------------------------------------------------------------------------------------------------------------------------- the page

const figure = value => Number(value.toPrecision(3)).toLocaleString("en-US", { maximumSignificantDigits: 3 });
const gb = bytes => `${figure(bytes / 1e9)} GB`;
const percent = share => `${Math.round(100 * share)} %`;
const times = ratio => `${figure(ratio.value)}x [${figure(ratio.low)}, ${figure(ratio.high)}]`;
const range = (timed) => { const i = interval(timed.ms, timed.sd); return `${figure(i.value)} [${figure(i.low)}, ${figure(i.high)}]`; };
const control = name => document.getElementById(`control-${name}`);

function state() {
  const scene = pageData.scenes[Number(control("cell").value)];
  return {
    scene,
    at: {
      batch: 2 ** Number(control("batch").value), prompt: 2 ** Number(control("prompt").value), newTokens: 2 ** Number(control("answer").value),
      bandwidth: scene.bandwidth * 2 ** Number(control("bandwidth").value), cacheBits: Number(control("cache").value),
      goal: control("goal").value,
    },
  };
}

function cellOf(text, className) {
  const td = document.createElement("td");
  td.textContent = text;
  if (className) td.className = className;
  return td;
}

function show() {
  const { scene, at } = state(), answer = decide(scene, at), base = answer.rows[0];
  const says = { batch: `${at.batch}`, prompt: `${at.prompt.toLocaleString("en-US")} tokens`, answer: `${at.newTokens.toLocaleString("en-US")} tokens`,
    bandwidth: `${figure(at.bandwidth)} GB/s` };
  for (const [name, text] of Object.entries(says)) {
    document.getElementById(`value-${name}`).textContent = text;
    control(name).setAttribute("aria-valuetext", text);
  }
  const chosen = answer.chosen;
  document.getElementById("verdict").textContent = chosen ? `${answer.verdict}: ${chosen.name}` : "not feasible";
  const parts = chosen
    ? [`${gb(chosen.memory.total)} of ${gb(answer.cell.capacity)}`, `${range(chosen.step)} ms per token`, `${figure(chosen.tokensPerSecond)} tokens/s`,
      `${times(ratioOf(answer.cell, base.objective, chosen.objective))} as fast as BF16`, `decode is ${chosen.step.parts[0].bound}-bound`]
    : [reasonOfNothing(answer)];
  if (answer.undecided.length) parts.push(`cannot be told apart from ${answer.undecided.map(row => row.name).join(", ")}`);
  const context = at.prompt + at.newTokens;
  if (scene.maxContext !== null && context > scene.maxContext) parts.push(`beyond the model's ${scene.maxContext.toLocaleString("en-US")} positions`);
  document.getElementById("verdict-facts").textContent = parts.join("; ");
  const body = document.getElementById("explored");
  body.replaceChildren(...answer.rows.filter(row => row.path).map(row => {
    const tr = document.createElement("tr");
    tr.className = `is-${row.status}${row.memory.fits ? "" : " is-too-large"}`;
    const name = document.createElement("th");
    name.scope = "row";
    name.textContent = row.name;
    const memory = cellOf(gb(row.memory.total), "figure"), bar = document.createElement("span"), fill = document.createElement("span");
    bar.className = "gauge";
    fill.style.width = `${Math.min(100, 100 * row.memory.total / answer.cell.capacity)}%`;
    bar.append(fill);
    memory.append(bar);
    tr.append(name, memory, cellOf(figure(row.first.ms), "figure"), cellOf(range(row.step), "figure"), cellOf(figure(row.tokensPerSecond), "figure"),
      cellOf(`${row.loss ? "+" : ""}${figure(row.loss)} %`, "figure"), cellOf(row.status === "chosen" ? "chosen" : row.reason, "words"));
    return tr;
  }));
}

function reasonOfNothing(answer) {
  const running = answer.rows.filter(row => row.path), fitting = running.filter(row => row.memory.fits);
  if (fitting.length) return "what fits breaks a limit of quality, time or cache";
  const smallest = running.reduce((a, b) => (b.memory.total < a.memory.total ? b : a));
  return `nothing fits: the smallest, ${smallest.name}, needs ${gb(smallest.memory.total)} of ${gb(answer.cell.capacity)}`;
}

function reset() {
  const { scene } = state(), work = scene.workload, log = value => String(Math.round(Math.log2(value)));
  control("batch").value = log(work.batch);
  control("prompt").value = log(work.prompt);
  control("answer").value = log(work.newTokens);
  control("bandwidth").value = "0";
  control("cache").value = "0";
  control("goal").value = work.goal;
  show();
}

pageData.scenes.forEach((scene, i) => {
  control("cell").add(new Option(`${scene.model} on ${scene.label}`, String(i)));
});
for (const name of ["batch", "prompt", "answer", "bandwidth", "cache", "goal"]) control(name).addEventListener("input", show);
control("cell").addEventListener("input", reset);
document.getElementById("reset").addEventListener("click", reset);
if (control("cell").options.length) reset();
else document.getElementById("explorer").hidden = true;
