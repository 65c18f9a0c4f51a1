"use strict";
// Flame charts on canvases: each [data-flame] has its data as JSON inside. Times are microseconds.

for (const box of document.querySelectorAll("[data-flame]")) {
  const chart = JSON.parse(box.querySelector("script").textContent);
  const canvas = box.querySelector("canvas"), told = box.querySelector(".told");
  const height = 20, gap = 4, name = 14, ruler = 20;
  const names = [...new Set(chart.rows.flatMap((row) => row.bars.map((bar) => bar[0])))];
  let from = 0, to = chart.length, pointers = new Map();

  // Colours by name, the same in every chart of the page; readable text on both light and dark.
  const hue = (text) => [...text].reduce((sum, letter) => (sum * 31 + letter.codePointAt(0)) % 360, 7);
  const colours = new Map(names.map((text) => [text, hue(text)]));
  const ms = (us) => (us >= 1000 ? `${(us / 1000).toFixed(us >= 1e5 ? 1 : 3)} ms` : `${us.toFixed(1)} µs`);

  function draw() {
    const style = getComputedStyle(document.documentElement), scale = devicePixelRatio || 1;
    const width = canvas.clientWidth, rows = chart.rows, dark = matchMedia("(prefers-color-scheme: dark)").matches;
    const full = ruler + rows.length * (height + name + gap);
    canvas.style.height = `${full}px`;
    canvas.width = width * scale;
    canvas.height = full * scale;
    const pen = canvas.getContext("2d");
    pen.scale(scale, scale);
    pen.clearRect(0, 0, width, full);
    pen.font = "12px system-ui, sans-serif";
    pen.textBaseline = "middle";
    const x = (time) => ((time - from) / (to - from)) * width;
    pen.fillStyle = style.getPropertyValue("--quiet");
    const marks = width < 480 ? 2 : 4;
    for (let mark = 0; mark <= marks; mark++) {
      pen.textAlign = mark === 0 ? "left" : mark === marks ? "right" : "center";
      pen.fillText(ms(from + ((to - from) * mark) / marks), (width * mark) / marks, ruler / 2);
    }
    pen.textAlign = "left";
    rows.forEach((row, place) => {
      const top = ruler + place * (height + name + gap);
      pen.fillStyle = style.getPropertyValue("--quiet");
      pen.fillText(row.name, 0, top + name / 2);
      let drawn = -1;
      for (const [text, start, length] of row.bars) {
        if (start + length < from || start > to) continue;
        const left = Math.max(x(start), 0), right = Math.min(x(start + length), width);
        if (right < drawn + 0.25 && right - left < 0.5) continue; // many to a pixel: one of them
        drawn = right;
        pen.fillStyle = `hsl(${colours.get(text)} 55% ${dark ? 38 : 72}%)`;
        pen.fillRect(left, top + name, Math.max(right - left - 0.5, 0.5), height);
        if (right - left > 24) {
          pen.save();
          pen.beginPath();
          pen.rect(left, top + name, right - left - 3, height);
          pen.clip();
          pen.fillStyle = dark ? "#fff" : "#111";
          pen.fillText(text, left + 4, top + name + height / 2 + 0.5);
          pen.restore();
        }
      }
    });
    canvas.dataset.from = from;
    canvas.dataset.to = to;
  }

  function look(start, end) {
    const least = Math.min(1, chart.length), span = Math.min(Math.max(end - start, least), chart.length);
    from = Math.min(Math.max(start, 0), chart.length - span);
    to = from + span;
    draw();
  }

  function zoom(factor, share = 0.5) {
    const at = from + (to - from) * share, span = (to - from) * factor;
    look(at - span * share, at + span * (1 - share));
  }

  function tell(event) {
    const place = Math.floor((event.offsetY - ruler) / (height + name + gap)), row = chart.rows[place];
    const time = from + ((to - from) * event.offsetX) / canvas.clientWidth;
    // half a pixel of tolerance, for bars that are thinner
    const near = (to - from) / canvas.clientWidth / 2;
    const bar = row && row.bars.find(([, start, length]) => start - near <= time && time <= start + length + near);
    told.textContent = bar ? `${row.name}: ${bar[0]}, ${ms(bar[2])} at ${ms(bar[1])}` : "";
  }

  const share = (event) => event.offsetX / canvas.clientWidth;
  canvas.addEventListener("wheel", (event) => {
    event.preventDefault();
    zoom(event.deltaY > 0 ? 1.25 : 0.8, share(event));
  }, { passive: false });
  canvas.addEventListener("pointerdown", (event) => {
    canvas.setPointerCapture(event.pointerId);
    pointers.set(event.pointerId, event.offsetX);
  });
  canvas.addEventListener("pointermove", (event) => {
    const before = pointers.get(event.pointerId);
    if (before === undefined) return tell(event);
    if (pointers.size === 1) {
      const moved = ((before - event.offsetX) / canvas.clientWidth) * (to - from);
      look(from + moved, to + moved);
    } else {
      const other = [...pointers].find(([id]) => id !== event.pointerId)[1];
      const was = Math.abs(before - other), is = Math.abs(event.offsetX - other);
      if (was > 8 && is > 8) zoom(was / is, (event.offsetX + other) / 2 / canvas.clientWidth);
    }
    pointers.set(event.pointerId, event.offsetX);
  });
  for (const end of ["pointerup", "pointercancel"]) {
    canvas.addEventListener(end, (event) => {
      pointers.delete(event.pointerId);
      tell(event);
    });
  }
  canvas.addEventListener("keydown", (event) => {
    const step = (to - from) / 5;
    const moves = {
      ArrowLeft: () => look(from - step, to - step), ArrowRight: () => look(from + step, to + step),
      ArrowUp: () => zoom(0.8), ArrowDown: () => zoom(1.25), Home: () => look(0, chart.length),
    };
    if (moves[event.key]) {
      event.preventDefault();
      moves[event.key]();
    }
  });
  box.querySelector(".bar").addEventListener("click", (event) => {
    const doing = event.target.dataset.do;
    if (doing) ({ in: () => zoom(0.5), out: () => zoom(2), all: () => look(0, chart.length) })[doing]();
  });
  new ResizeObserver(draw).observe(canvas.parentElement);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
  addEventListener("beforeprint", draw);
}
