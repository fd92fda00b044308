// Where the service is, also behind a proxy that puts a path in front of it.

export const base = new URL(".", document.baseURI).href.replace(/\/$/, "");
