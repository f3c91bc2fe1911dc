"""The report's page: its frame and style sheet."""

from string import Template

PAGE = Template("""\
<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>$title</title>
<style>
:root {
  --paper: #fcfcfb; --card: #fff; --ink: #1b1d21; --soft: #646a73; --line: #e3e5e8;
  --other: #c3c8cf; --accent: #2b6cdb;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #15171a; --card: #1c1f23; --ink: #e9ebee; --soft: #9aa1ab; --line: #30343a;
    --other: #4b515a; --accent: #5b93f0;
  }
}
* { box-sizing: border-box }
body {
  margin: 0 auto; padding: 2.5rem 1.25rem 3rem; max-width: 58rem; background: var(--paper); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif;
  -webkit-text-size-adjust: 100%;
}
.brand { color: var(--soft); font-size: .85rem; letter-spacing: .04em }
h1 {
  margin: .4rem 0 .5rem; font-size: clamp(1.5rem, 5vw, 2.1rem); line-height: 1.2;
  letter-spacing: -.015em; text-wrap: balance;
}
h2 { margin: 2.75rem 0 .35rem; font-size: 1.1rem }
p { margin: .35rem 0; overflow-wrap: anywhere }
.lead, .note, .conditions p { color: var(--soft) }
.note, .conditions { font-size: .9rem }
em { font-style: normal; color: var(--accent) }
.tiles {
  display: grid; grid-template-columns: repeat(auto-fit, minmax(9.5rem, 1fr));
  gap: .75rem; margin: 1.5rem 0 0;
}
.tile { padding: .8rem 1rem; border: 1px solid var(--line); border-radius: .6rem; background: var(--card) }
.tile span { display: block; color: var(--soft); font-size: .85rem }
.tile b { display: block; font-size: 1.6rem; line-height: 1.3; font-weight: 600; font-variant-numeric: tabular-nums }
svg.chart {
  display: block; width: 100%; height: auto;
  margin-top: .75rem; font-size: 14px; font-variant-numeric: tabular-nums;
}
svg .label, svg .value { fill: var(--ink) }
svg .soft { fill: var(--soft) }
svg .accent { fill: var(--accent) }
svg .other { fill: var(--other) }
svg .grid { stroke: var(--line) }
svg .bound { stroke: var(--soft); stroke-dasharray: 5 4 }
svg .path { fill: none; stroke: var(--accent); stroke-width: 2 }
svg .dot { fill: var(--accent); stroke: var(--paper); stroke-width: 2 }
svg .dot.plain { fill: var(--soft) }
.plans { display: grid; grid-template-columns: repeat(3, 1fr); gap: 1.25rem; margin-top: 1rem }
figure { margin: 0 }
figure svg {
  display: block; width: 100%; border: 1px solid var(--line);
  border-radius: .35rem; background: var(--card);
}
figure image { image-rendering: pixelated }
.triangle { fill: var(--line); opacity: .45 }
figcaption { display: flex; justify-content: space-between; margin-top: .3rem; color: var(--soft); font-size: .85rem }
figcaption b { color: var(--ink); font-weight: 600 }
.wide { overflow-x: auto; margin-top: .75rem }
table { width: 100%; border-collapse: collapse; font-size: .88rem; font-variant-numeric: tabular-nums }
th, td { padding: .45rem 0 .45rem 1rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap }
th:first-child { padding-left: 0; text-align: left }
th { font-weight: 600 }
thead th { color: var(--soft); font-weight: 500 }
.question { font-weight: 600 }
dt { margin-top: .7rem; color: var(--soft); font-size: .85rem }
dd {
  margin: 0; padding-left: .8rem; border-left: 3px solid var(--line);
  white-space: pre-wrap; overflow-wrap: anywhere;
}
.conditions { margin-top: 2.75rem; padding-top: .75rem; border-top: 1px solid var(--line) }
@media (max-width: 40rem) {
  svg.chart { font-size: 18px }
  .plans { grid-template-columns: repeat(2, 1fr); gap: .9rem }
}
@media print {
  :root { --paper: #fff; --card: #fff; --ink: #000; --soft: #555; --line: #ddd; --other: #c3c8cf; --accent: #2b6cdb }
  body { max-width: none; padding: 0; font-size: 11pt; print-color-adjust: exact; -webkit-print-color-adjust: exact }
  h1 { font-size: 1.5rem }
  h2 { margin-top: 1.4rem }
  svg.chart { width: 84% }
  section, figure, tr { break-inside: avoid }
  table { font-size: 8.5pt }
  th, td { padding: .3rem .35rem }
}
</style>
<header>
  <div class="brand">scrimp demo</div>
  <h1>$model reads $tokens tokens and starts answering <em>$verdict</em></h1>
  <p class="lead">Budget “$budget” against dense attention; text: $text.</p>
</header>
<section class="tiles">$tiles</section>
<section>
  <h2>Time to first token</h2>
  <p class="note">Seconds from the prompt to the first token of the answer. What attention does not
  take, it cannot save.</p>
  $bars
</section>
<section>
  <h2>What a budget buys</h2>
  <p class="note">Speed-up against the change of perplexity on held-out text. Higher and further left is better.</p>
  $frontier
</section>
<section>
  <h2>What the heads read</h2>
  <p class="note">Plans of a few heads, from the sparsest to the densest. Queries run down, keys to the
  right; blue is read,
  grey is skipped. The percentage is the share of the triangle that is read.</p>
  <div class="plans">$plans</div>
</section>
<section>
  <h2>All figures</h2>
  <div class="wide"><table><thead><tr>$head</tr></thead><tbody>$body</tbody></table></div>
</section>
<section>$answers</section>
<section class="conditions">$conditions</section>
</html>
""")
