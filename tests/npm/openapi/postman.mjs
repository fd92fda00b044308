// Prints the requests of the collection that Postman makes of a document, as JSON. Argument: file of the document.

import { readFileSync } from "node:fs";
import converter from "openapi-to-postmanv2";

const document = readFileSync(process.argv[2], "utf8");
converter.convert({ type: "string", data: document }, { requestParametersResolution: "Example", exampleParametersResolution: "Example" }, (error, { result, reason, output }) => {
  if (error || !result) throw new Error(reason);
  const requests = (items) => items.flatMap((item) => (item.item ? requests(item.item) : [item.request]));
  console.log(JSON.stringify({
    variables: output[0].data.variable,
    requests: requests(output[0].data.item).map(({ method, url, auth, body }) => ({ method, path: `/${url.path.join("/")}`, auth: auth?.type, body })),
  }));
});
