"""The style sheet of the report page: system fonts, two themes, one column on a phone."""

from etr.report.style import theme_variables

_LIGHT = (
    "color-scheme:light;--paper:#f5f4f0;--line:#dfdcd4;--hover:#f6f4ee;--good:#00694e;"
    f"--bad:#a83e00;--alarm:#7d5b00;--good-wash:#e1f1ea;--bad-wash:#fbe9df;--link:#0a5a99;{theme_variables(False)}"
)
_DARK = (
    "color-scheme:dark;--paper:#12171b;--line:#2d363e;--hover:#20272d;--good:#5fd6ac;"
    f"--bad:#ff9d66;--alarm:#e6bf55;--good-wash:#17332b;--bad-wash:#3a2418;--link:#7fc0f7;{theme_variables(True)}"
)

STYLE_SHEET = (
    f":root{{{_LIGHT}}}\n@media (prefers-color-scheme:dark){{:root{{{_DARK}}}}}\n"
    + """
:root{--sans:system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif;
--mono:ui-monospace,SFMono-Regular,Menlo,Consolas,monospace}
*{box-sizing:border-box}
html{-webkit-text-size-adjust:100%}
body{margin:0;background:var(--paper);color:var(--ink);font:16px/1.55 var(--sans)}
main,header,footer{max-width:1240px;margin:0 auto;padding:0 clamp(16px,3.2vw,40px)}
header{padding-top:clamp(28px,5vw,60px)}
h1{font-size:clamp(1.7rem,1.2rem + 2vw,2.5rem);line-height:1.15;letter-spacing:-.02em;
font-weight:680;margin:0 0 .6rem;text-wrap:balance}
h2{font-size:1.3rem;letter-spacing:-.01em;font-weight:650;margin:3.2rem 0 .9rem}
h3{font-size:1rem;font-weight:620;line-height:1.35;margin:0;text-wrap:balance}
p{margin:0 0 .8rem;max-width:72ch}
.eyebrow{font-size:.8rem;font-weight:600;letter-spacing:.06em;text-transform:uppercase;
color:var(--soft);margin:0 0 .7rem}
.lead{font-size:1.12rem;color:var(--soft);max-width:68ch}
.card{background:var(--card);border:1px solid var(--line);border-radius:12px}
.scroll{overflow-x:auto;-webkit-overflow-scrolling:touch}
table.results{border-collapse:separate;border-spacing:0;width:100%;font-size:.9rem;line-height:1.35;
font-variant-numeric:tabular-nums}
.results th,.results td{padding:.7rem .6rem;text-align:left;vertical-align:top;
border-top:1px solid var(--line)}
.results thead th{border-top:0;color:var(--soft);font-weight:600;font-size:.8rem;
vertical-align:bottom;white-space:nowrap}
.results thead small{display:block;font-weight:400}
.results .num{text-align:right;white-space:nowrap}
.results small{display:block;font-size:.79rem;color:var(--soft)}
.results tbody th{font-weight:620;position:sticky;left:0;background:var(--card);min-width:8.5rem;
max-width:14rem;overflow-wrap:anywhere;padding-left:1.1rem;z-index:1}
.results thead th:first-child{position:sticky;left:0;background:var(--card);padding-left:1.1rem;
z-index:1}
.results td:last-child,.results thead th:last-child{padding-right:1.1rem}
.results tbody tr:hover>*{background:var(--hover)}
.results thead th:first-child{border-top-left-radius:12px}
.results tbody tr:last-child th{border-bottom-left-radius:12px}
.swatch{display:block;width:34px;height:10px;margin:.1rem 0 .25rem;overflow:visible}
.good{color:var(--good)}.bad{color:var(--bad)}.alarm{color:var(--alarm)}.quiet{color:var(--soft)}
.results .chip{display:inline-block;padding:.05rem .5rem;border-radius:99px;
background:var(--hover);border:1px solid var(--line);margin-top:.2rem}
.results .good .chip{background:var(--good-wash);border-color:transparent;color:var(--good)}
.results .bad .chip{background:var(--bad-wash);border-color:transparent;color:var(--bad)}
.results .alarm small{color:var(--alarm);font-weight:600}
.notes{color:var(--soft);font-size:.85rem;margin:.9rem 0 0;padding:0 0 0 1.1rem}
.notes li{margin:.15rem 0;max-width:96ch}
.reading{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,300px),1fr));gap:16px}
.reading section{padding:1.1rem 1.25rem 1.2rem}
.reading .caveats{grid-column:1/-1}
.caveats li{max-width:96ch}
.reading h3{margin:0 0 .6rem;display:flex;align-items:center;gap:.55rem}
.reading h3::before{content:"";width:9px;height:9px;border-radius:50%;background:var(--soft)}
.reading .gains h3::before{background:var(--good)}
.reading .losses h3::before{background:var(--bad)}
.reading .caveats h3::before{background:var(--alarm)}
.reading dl,.reading ul{margin:0;font-size:.93rem}
.reading dt{font-weight:620;overflow-wrap:anywhere}
.reading dd{margin:.1rem 0 .35rem;color:var(--soft)}
.reading dd:last-of-type{margin-bottom:0}
.reading dd+dt{margin-top:.7rem}
.reading ul{padding-left:1.05rem;color:var(--soft)}
.reading li+li{margin-top:.45rem}
.reading .none{color:var(--soft);font-size:.93rem;margin:0}
nav{display:flex;flex-wrap:wrap;gap:.35rem .5rem;margin:0 0 .4rem}
nav a{padding:.2rem .75rem;border:1px solid var(--line);border-radius:99px;background:var(--card);
font-size:.88rem;text-decoration:none}
a{color:var(--link)}
h3.group{margin:1.9rem 0 .8rem;font-size:1.08rem;color:var(--soft)}
h4{font-size:1rem;font-weight:620;line-height:1.35;margin:0;text-wrap:balance}
.alarms{margin:0;padding:1rem 1.25rem 1rem 2.3rem;border-left:4px solid var(--alarm);
font-size:.95rem}
.alarms li+li{margin-top:.45rem}
p.none{color:var(--soft)}
.figures{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,460px),1fr));gap:20px;
align-items:start}
figure{margin:0;padding:1.1rem 1.2rem 1.15rem}
figure svg{display:block;width:100%;height:auto;margin:.7rem 0 .6rem}
figure svg *{stroke-linejoin:round;stroke-linecap:butt}
figcaption{color:var(--soft);font-size:.83rem;line-height:1.5}
.wide{grid-column:1/-1}
.routed+.routed{margin-top:1.4rem}
.routed h4{font-size:.93rem;margin:.9rem 0 .4rem}
.routed details{margin-top:.4rem}
.routed summary{padding:.3rem 0;font-size:.88rem;border:0}
.routed p{margin:0 0 .4rem;max-width:none}
.routed .domain{font-size:.8rem;color:var(--soft);margin-top:.5rem}
.tokens{font:.9rem/1.75 var(--mono);white-space:pre-wrap;overflow-wrap:anywhere}
.tokens span{background:hsl(var(--hue) 70% 86%);border-radius:3px;padding:.08em 0}
.tokens s{color:var(--soft);text-decoration-thickness:1.5px}
.skipped{padding:1.1rem 1.2rem}
.skipped h4{color:var(--soft)}
.skipped p{color:var(--soft);font-size:.9rem;margin:.4rem 0 0}
pre{margin:0;padding:1rem 1.2rem;overflow-x:auto;font:.86rem/1.55 var(--mono);tab-size:2}
.facts{display:grid;grid-template-columns:max-content 1fr;gap:.3rem 1.4rem;margin:1.2rem 0;
font-size:.92rem;font-variant-numeric:tabular-nums}
.facts dt{color:var(--soft)}
.facts dd{margin:0;overflow-wrap:anywhere}
details{margin-top:1rem}
summary{cursor:pointer;padding:.75rem 1.2rem;font-weight:600;font-size:.95rem}
details[open] summary{border-bottom:1px solid var(--line)}
:focus-visible{outline:2px solid var(--series-1);outline-offset:2px}
footer{padding-top:2.6rem;padding-bottom:3rem;color:var(--soft);font-size:.83rem}
@media (max-width:600px){body{font-size:15px}h2{margin-top:2.4rem}
main,header,footer{padding-left:10px;padding-right:10px}figure{padding:.85rem .6rem .9rem}
.results th,.results td{padding:.6rem .5rem}
.results tbody th,.results thead th:first-child{padding-left:.8rem;min-width:6.4rem;
max-width:8rem;border-right:1px solid var(--line)}}
@media (prefers-color-scheme:dark){.tokens span{background:hsl(var(--hue) 42% 24%)}}
@media print{body{background:#fff}.card{break-inside:avoid}.scroll{overflow:visible}}
"""
)
