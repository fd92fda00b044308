// The studio as its components use it.

import { createContext } from "./preact.js";
import { useContext } from "./hooks.js";
import { errorText, useText } from "./ui.js";

export const StudioContext = createContext(null);

export function useStudio() {
  const studio = useContext(StudioContext);
  return { studio, state: studio.state, t: useText().t };
}

// Returns the text of a field's fault: ours, or the server's message.
export function faultText(t, fault) {
  if (fault.text) return t(fault.text, fault.values);
  return fault.error ? t("inputs.failed", { name: fault.name, reason: errorText(t, fault.error) }) : fault.message;
}
