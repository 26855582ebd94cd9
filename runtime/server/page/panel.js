/** The panel of charts, parameters and facts: its tabs, and its place beside the chat or, where that is narrow, in a dialog. */

const WIDE = matchMedia("(min-width: 60rem)");

/** Tabs as in WAI-ARIA's pattern: arrows, Home and End move and select; Tab goes on to what is shown. */
export function setUpTabs(onShown) {
  const tabs = [...document.querySelectorAll("#panel [role=tab]")];
  const select = (chosen) => {
    for (const tab of tabs) {
      tab.setAttribute("aria-selected", String(tab === chosen));
      tab.tabIndex = tab === chosen ? 0 : -1;
      document.getElementById(tab.getAttribute("aria-controls")).hidden = tab !== chosen;
    }
    onShown();
  };
  tabs.forEach((tab, index) => {
    const targets = { ArrowLeft: index - 1, ArrowRight: index + 1, Home: 0, End: -1 };
    tab.addEventListener("click", () => select(tab));
    tab.addEventListener("keydown", ({ key }) => {
      if (!(key in targets)) return;
      const target = tabs.at(targets[key] % tabs.length);
      select(target);
      target.focus();
    });
  });
}

/** Put the panel beside the chat or into the dialog, as the window's width asks for. */
export function setUpSheet(onShown) {
  const [side, sheet, panel] = ["side", "sheet", "panel"].map((id) => document.getElementById(id));
  const place = () => {
    sheet.close();
    (WIDE.matches ? side : sheet).append(panel);
    onShown();
  };
  document.getElementById("open-sheet").addEventListener("click", () => {
    sheet.showModal();
    onShown();
  });
  document.getElementById("close-sheet").addEventListener("click", () => sheet.close());
  sheet.addEventListener("click", (event) => {
    if (event.target === sheet) sheet.close(); // the backdrop
  });
  WIDE.addEventListener("change", place);
  place();
}
