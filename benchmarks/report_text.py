"""What the report says around its tables, and how it looks."""

from __future__ import annotations

#: Sections in order, by the anchor that leads to them.
TITLES = {
    "headline": "Gain in macro F1",
    "against": "CFGen against every arm",
    "losses": "Largest losses and gains",
    "types": "Gain by type",
    "frequency": "Gain against frequency",
    "oracle": "Share of the oracle's gain",
    "neighbours": "Number of neighbours",
    "realism": "Realism",
    "memorisation": "Memorisation",
    "costs": "Costs",
    "splits": "Splits",
    "reading": "How to read this",
    "provenance": "Provenance",
}

INTRODUCTIONS = {
    "headline": "What each arm's cells change in the F1 of held-out cells, averaged over the types "
    "of a group. The first row is absolute; the others are differences to it, with their interval "
    "and the number of splits in which the arm did better. Blue is a gain, orange a loss; bold, "
    "or a filled dot, is a difference whose interval leaves out zero.",
    "against": "What CFGen gains over each of the others in the same splits, and in how many of "
    "them it is ahead. Below zero the other is better.",
    "losses": "Types that score lower and higher than without new cells, over all settings of the "
    "headline (a type counts once per setting); clear: the interval leaves out zero.",
    "types": "F1 of every type without new cells, then the gain. Below each gain: splits won, and "
    "the arm's own F1, recall (R) and precision (P).",
    "frequency": "Whether rarer types gain more, as in Fig. 5 of the CFGen paper, whose accuracy "
    "per type is recall. Any arm that moves weight to rare types can show this, plain reweighting "
    "included: compare r between arms. Intervals are over splits, for these types; p treats types "
    "as independent.",
    "oracle": "The arm's gain over the gain of the oracle, which adds as many unused real cells. "
    "1 is as good as real cells, below 0 a loss; n/a: the oracle's own interval is not above zero, "
    "so there is no gain to share, or there was no pool of unused cells.",
    "neighbours": "Whether the gain of kNN depends on k.",
    "realism": "Made cells against real cells of their type from held-out donors. The first row "
    "compares real cells of the training donors with them in the same way: it is what perfect "
    "cells of those donors would score. Blue is above that row and orange below it; neither is "
    "good: the aim is no colour. A 10-NN F1 above that of real cells means types further apart "
    "than in truth. n/a: too few cells, or values that are not counts.",
    "memorisation": "Exact copies: share of new cells equal to a training cell. Closest-record "
    "ratio: median distance to the closest training cell, over that of unused real cells of the "
    "same donors (0 for copies, 1 for new draws). Neighbour ratio: the same for nearest over "
    "second nearest. Membership AUC: 0.5 if the new cells do not tell who was trained on. Arms "
    "that copy training cells are bound to score worst. The oracle is left out: its cells are the "
    "unused ones that the others are held against.",
    "costs": "Wall seconds to fit and to make the cells, CPU seconds of both, and the rise of "
    "peak memory over the start.",
    "splits": "Nothing is fitted on, or chosen with, a held-out cell.",
}

READING = (
    "The arm <i>none</i> is the paired baseline: same split, same classifiers, no new cells. "
    "Every gain is a difference to it within a split.",
    "Seeds are averaged within a split first: they are repeats of one split, not more donors.",
    "The interval is a 95% percentile bootstrap over splits. With few splits it is rough and too "
    "narrow (with five it covers about 85%), and splits that share training donors are not "
    "independent: read it with the number of splits won.",
    "kNN on a frozen embedding saturates with trivial generators: copies or independent noise per "
    "type can win as much as real cells do. Logistic regression leaves room to tell arms apart; "
    "read it too.",
    "All arms add the same number of cells of each type, except <i>reweight</i>, which adds none, "
    "and the oracle, which has no more than its pool holds.",
    "Macro means give each type of a group the same weight, however few its test cells.",
)

STYLE = """
:root{color-scheme:light dark;--line:#8885;--head:#8881;--page:#fff}
@media(prefers-color-scheme:dark){:root{--page:#16181b}}
*{box-sizing:border-box}
body{font:16px/1.5 system-ui,sans-serif;max-width:76rem;margin:0 auto;padding:1rem;
background:var(--page)}
h1{font-size:1.5rem;line-height:1.25}
h2{font-size:1.25rem;margin:2.5rem 0 .5rem;border-top:1px solid var(--line);padding-top:1rem}
h3{font-size:1rem;margin:1.5rem 0 .4rem;overflow-wrap:anywhere}
p,li{max-width:46rem;overflow-wrap:anywhere}
nav{line-height:2}
.banner{border:2px solid #D55E00;padding:.6rem .8rem;font-weight:600}
.note{border-left:4px solid #0072B2;padding:.2rem .8rem}
.scroll{overflow-x:auto}
table{border-collapse:separate;border-spacing:0;font-size:.8rem;font-variant-numeric:tabular-nums}
th,td{padding:.25rem .6rem;border-bottom:1px solid var(--line);text-align:right;
vertical-align:top;white-space:nowrap}
thead th{white-space:normal;min-width:5rem;vertical-align:bottom;background:var(--head)}
tr>:first-child{text-align:left;position:sticky;left:0;background:var(--page)}
tbody th{font-weight:600}
td small{display:block;opacity:.75;font-size:.7rem;white-space:normal}
figure{margin:1rem 0}
figure .scroll{background:#fff}
figure img{display:block;width:100%;min-width:46rem;height:auto}
figcaption{font-size:.85rem;opacity:.8}
dl{margin:0;display:grid;grid-template-columns:minmax(6rem,max-content) 1fr;gap:.1rem 1rem}
dt{font-weight:600}
dd{margin:0;min-width:0;overflow-wrap:anywhere}
dd ul{margin:0;padding-left:1.1rem}
@media(max-width:40rem){dl{grid-template-columns:1fr}dd{padding-left:1rem}}
@page{margin:12mm}
@media print{body{max-width:none;padding:0;font-size:9pt}nav{display:none}
.scroll{overflow:visible}table{font-size:6pt}th,td{padding:.1rem .2rem;white-space:normal}
td small{font-size:5pt}
figure img{min-width:0}figure,tr{break-inside:avoid}h2,h3{break-after:avoid}
td{print-color-adjust:exact;-webkit-print-color-adjust:exact}
tr>:first-child{position:static}}
"""
