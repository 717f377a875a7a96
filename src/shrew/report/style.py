"""The page's style sheet: one accent colour, light and dark, phone and paper."""

CSS = """
:root{color-scheme:light dark;--ink:#1d1f21;--soft:#5c6166;--line:#dfe2e5;--paper:#fff;--wash:#f5f6f7;
--accent:#0a6c66;--tint:#d8efec;--mono:ui-monospace,SFMono-Regular,Menlo,Consolas,"DejaVu Sans Mono",monospace}
@media (prefers-color-scheme:dark){:root{--ink:#e6e7e9;--soft:#a1a7ad;--line:#34393e;--paper:#15171a;--wash:#1d2023;
--accent:#53c6bb;--tint:#15403c}}
*{box-sizing:border-box}
html{-webkit-text-size-adjust:100%;text-size-adjust:100%}
body{margin:0;background:var(--paper);color:var(--ink);
font:16px/1.6 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif;overflow-wrap:anywhere}
main,footer{max-width:52rem;margin:0 auto;padding:0 clamp(1rem,4vw,2rem)}
main{padding-top:clamp(1.75rem,6vw,4rem)}
.eyebrow{margin:0 0 .9rem;color:var(--soft);font-size:.875rem;overflow-wrap:anywhere}
.state{display:inline-block;margin:0 .6rem 0 0;padding:.05rem .6rem;border:1px solid currentColor;border-radius:1rem;
font-weight:600}
.state.met{color:var(--accent)}.state.missed{color:var(--ink)}
h1{margin:0;font-size:clamp(1.4rem,1.1rem + 1.4vw,1.8rem);line-height:1.3;font-weight:650;letter-spacing:-.012em;
text-wrap:pretty}
.note{color:var(--soft);max-width:42rem}
header .note{margin:1rem 0 0}
.facts{display:grid;grid-template-columns:repeat(auto-fit,minmax(9rem,1fr));gap:1rem 2rem;margin:2rem 0 0;
padding:1.25rem 0;border-top:1px solid var(--line);border-bottom:1px solid var(--line)}
.facts div{display:flex;flex-direction:column}
.facts dt{order:2;color:var(--soft);font-size:.8125rem;line-height:1.4}
.facts dd{margin:0;font-size:1.4rem;font-weight:600;letter-spacing:-.01em;font-variant-numeric:tabular-nums}
section{margin-top:3.25rem}
h2{margin:0 0 .4rem;font-size:1.2rem;line-height:1.35;font-weight:650;letter-spacing:-.005em}
h3{margin:1.75rem 0 .4rem;font-size:1rem;font-weight:600}
p{margin:.4rem 0 1rem}
.scroll{overflow-x:auto;margin:1rem 0;-webkit-overflow-scrolling:touch}
.scroll:focus-visible,summary:focus-visible{outline:2px solid var(--accent);outline-offset:3px}
table{border-collapse:collapse;overflow-wrap:break-word;width:100%;font-size:.875rem;line-height:1.45}
th,td{padding:.45rem .75rem;border-bottom:1px solid var(--line);text-align:left;vertical-align:top}
th:first-child,td:first-child{padding-left:0}th:last-child,td:last-child{padding-right:0}
thead th{border-bottom:1px solid var(--soft);font-weight:600;vertical-align:bottom}
tbody th{font-weight:400}
.num{text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap}
.best{font-weight:650;color:var(--accent)}
thead .best{box-shadow:inset 0 2px var(--accent);padding-top:.6rem}
td small,th small{display:block;color:var(--soft);font-weight:400;font-size:.8125rem}
.group th{padding-top:1.4rem;color:var(--soft);font-weight:600;font-size:.8125rem}
.tight td{white-space:nowrap}
.name{font-family:var(--mono);font-size:.8125rem}
figure{margin:1rem 0}
svg{display:block;max-width:100%}
.frontier{width:100%;height:auto;font:12px/1 system-ui,-apple-system,"Segoe UI",Roboto,Arial,sans-serif;
font-variant-numeric:tabular-nums}
.frontier text{fill:var(--ink)}.frontier text.soft{fill:var(--soft)}
.frontier .label{paint-order:stroke;stroke:var(--paper);stroke-width:3px;stroke-linejoin:round}
.frontier .label.trial{fill:var(--soft)}
.frontier .label.chosen{fill:var(--accent);font-weight:700}.frontier .label.near{font-weight:700}
.narrow{display:none}
.grid{stroke:var(--line);fill:none}.axis{stroke:var(--soft);fill:none}
.floor{stroke:var(--ink);stroke-dasharray:6 4;fill:none}
.stairs{stroke:var(--soft);stroke-width:1;stroke-opacity:.55;fill:none}
.whisker{stroke:var(--soft);stroke-width:1.2;fill:none}.whisker.chosen{stroke:var(--accent);stroke-width:1.8}
.mark{stroke:var(--soft);stroke-width:1.6;fill:var(--soft)}
.mark.original,.mark.healed,.mark.near{stroke:var(--ink);fill:var(--ink)}
.mark.chosen{stroke:var(--accent);fill:var(--accent)}
.mark.hollow{fill:var(--paper)}.mark .ring{fill:none;stroke-width:1.4}
.legend{display:flex;flex-wrap:wrap;gap:.3rem 1.25rem;margin:.75rem 0 0;padding:0;list-style:none;color:var(--soft);
font-size:.8125rem}
.legend li{display:flex;align-items:center;gap:.4rem}.key{width:16px;height:16px;flex:none}
.rows{margin:1.25rem 0;padding:0;list-style:none}
.rows li{display:grid;grid-template-columns:minmax(10rem,3fr) minmax(6rem,4fr) minmax(13rem,4fr);gap:.25rem 1.25rem;
align-items:center;padding:.6rem 0;border-bottom:1px solid var(--line);font-size:.875rem;line-height:1.45}
.rows small{display:block;color:var(--soft);font-size:.8125rem}
.bars{width:100%}.bars .all{fill:var(--line)}.bars .was{fill:var(--soft);fill-opacity:.55}.bars .now{fill:var(--accent)}
.swatch{display:inline-block;width:1.1rem;height:.55rem;margin-right:.35rem;background:var(--accent)}
.swatch.was{background:var(--soft);opacity:.55}
pre,.text{font:.8125rem/1.55 var(--mono);white-space:pre-wrap;overflow-wrap:anywhere;tab-size:4}
pre{margin:1rem 0;padding:.9rem 1rem;background:var(--wash);border-radius:6px}
code{font-family:var(--mono);font-size:.875em;overflow-wrap:anywhere}pre code{font-size:inherit}
.pair{display:grid;grid-template-columns:1fr 1fr;gap:.75rem;margin:1.5rem 0}
.pair .prompt{grid-column:1/-1}
.pair>div{min-width:0}
.pair .who{display:block;margin-bottom:.25rem;color:var(--soft);font-size:.8125rem}
.pair .text{margin:0;padding:.75rem .9rem;border-radius:6px;background:var(--wash)}
.pair .prompt .text{background:none;border:1px solid var(--line)}
.text mark{background:var(--tint);color:inherit;text-decoration:underline;text-decoration-color:var(--accent);
text-decoration-thickness:1px;text-underline-offset:3px}
details{margin:1rem 0;border-top:1px solid var(--line);border-bottom:1px solid var(--line)}
details+details{margin-top:-1rem;border-top:0}
summary{padding:.6rem 0;cursor:pointer;font-weight:600;font-size:.9375rem}
.pairs{display:grid;grid-template-columns:minmax(8rem,12rem) 1fr;gap:.35rem 1.5rem;font-size:.875rem;margin:1rem 0}
.pairs dt{color:var(--soft)}.pairs dd{margin:0;min-width:0;overflow-wrap:anywhere}
.tools dt{font-weight:600;margin-top:1.25rem}.tools dd{margin:0}.tools pre{margin:.4rem 0}
.tools dd p{margin:0;color:var(--soft);font-size:.875rem}
footer{margin-top:4rem;padding-top:1rem;padding-bottom:3rem;color:var(--soft);font-size:.8125rem}
@media (max-width:40rem){
.wide{display:none}.narrow{display:block}
.facts{grid-template-columns:1fr 1fr}
.rows li{grid-template-columns:1fr}
.pair{grid-template-columns:1fr}
th,td{padding:.45rem .45rem}.models thead .num,.models small{white-space:normal}.rows .num{text-align:left;
white-space:normal}.rows li>*{min-width:0}
.rows li{gap:.35rem}
.pairs{grid-template-columns:1fr;gap:0}.pairs dd{margin-bottom:.6rem}
section{margin-top:2.75rem}
}
@media print{
:root{color-scheme:light;--ink:#000;--soft:#444;--line:#ccc;--paper:#fff;--wash:#fff;--accent:#075650;--tint:#fff}
@page{margin:18mm 16mm}
*{print-color-adjust:exact;-webkit-print-color-adjust:exact}
body{font-size:10.5pt}main,footer{max-width:none;padding-left:0;padding-right:0}main{padding-top:0}
.wide{display:block}.narrow{display:none}.frontier{max-width:14cm;margin:0 auto}
section{margin-top:1.6rem}h2,h3,h2+.note,summary{break-after:avoid}
figure,.rows li,.pair,tr,.facts{break-inside:avoid}
.scroll{overflow:visible}table{font-size:8.5pt}td small,th small{font-size:7.5pt}.tight td{white-space:normal;
overflow-wrap:anywhere}
pre,.pair .text{border:1px solid var(--line)}
details::details-content{content-visibility:visible;height:auto;opacity:1}
summary{list-style:none}summary::-webkit-details-marker{display:none}
}
"""
