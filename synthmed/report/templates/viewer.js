(() => {
  "use strict";
  const box = document.getElementById("viewer");
  const volumes = JSON.parse(document.getElementById("viewer-volumes").textContent);
  const status = box.querySelector(".status");
  const buttons = [...box.querySelectorAll("button")];
  let viewer = null;

  // the library waits as text: nobody who does not ask for it pays for its start
  function load() {
    const script = document.createElement("script");
    script.textContent = document.getElementById("viewer-library").textContent;
    document.body.append(script);
  }

  async function open() {
    if (!document.createElement("canvas").getContext("webgl2")) {
      throw new Error("This browser has no WebGL2, which the viewer needs. The slices below show the scans without it.");
    }
    load();
    const nv = new niivue.Niivue({
      backColor: [0, 0, 0, 1],
      crosshairColor: [1, 0.75, 0.2, 0.7],
      crosshairWidth: 0.3,
      isRadiologicalConvention: true,
      sagittalNoseLeft: true,
      loadingText: "",
      dragAndDropEnabled: false,
    });
    // the library makes the canvas as large as what it stands in
    box.querySelector(".stage").hidden = false;
    await nv.attachToCanvas(box.querySelector("canvas"));
    nv.setSliceType(nv.sliceTypeMultiplanar);
    return nv;
  }

  async function show(index) {
    try {
      box.dataset.shown = "";
      viewer ??= open();
      const nv = await viewer;
      const image = await niivue.NVImage.loadFromBase64({ base64: volumes[index], name: "scan.nii.gz" });
      for (const old of [...nv.volumes]) nv.removeVolume(old);
      nv.addVolume(image);
      buttons.forEach((b, i) => b.setAttribute("aria-pressed", String(i === index)));
      status.textContent = buttons[index].textContent + " is shown.";
      box.dataset.shown = String(index);
    } catch (error) {
      status.textContent = error.message;
      box.dataset.shown = "failed";
    }
  }

  buttons.forEach((button, index) => button.addEventListener("click", () => show(index)));
  box.hidden = false;
})();
