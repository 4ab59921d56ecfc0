  const dark = matchMedia("(prefers-color-scheme: dark)"), touch = matchMedia("(pointer: coarse)").matches;
  const colour = name => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

  // Plotly paints into SVG and cannot read the page's CSS variables by itself.
  function theme() {
    const [text, line] = [colour("--text"), colour("--line")];
    const layout = {"font.color": text, "hoverlabel.bgcolor": colour("--panel"), "hoverlabel.font.color": text};
    for (const axis of ["xaxis", "yaxis"]) Object.assign(layout, {[axis + ".gridcolor"]: line, [axis + ".linecolor"]: line});
    return layout;
  }

  // Whether it is pressed after this click.
  function turned(button) {
    const pressed = button.getAttribute("aria-pressed") === "false";
    button.setAttribute("aria-pressed", pressed);
    return pressed;
  }
