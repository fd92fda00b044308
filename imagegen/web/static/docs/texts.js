// Texts of the page in English and Chinese. The document itself is English.

import { applySaved } from "./assets.js";

export const language = applySaved();

const TEXTS = {
  en: {
    contents: "Routes", search: "Search", "search.hint": "a route, a field, or a word of its description", "search.none": "Nothing has these words.",
    key: "API key or admin token", "key.text": "It is kept in this tab only, and sent with every call of this page.",
    copy: "Copy", copied: "Copied", selected: "Selected", send: "Send", waiting: "Waiting …", unanswered: "No answer: {reason}", headers: "Headers", cut: "The stream was cut.",
    parameters: "Parameters", body: "Body", answers: "Responses", fields: "Fields", example: "Example: {name}", examples: "Example of a body", required: "required", optional: "optional",
    file: "File", next: "Next:", image: "Image {number}", elsewhere: "Image {number}, at the provider", sample: "Language of the example", carried: "from the last response",
    failed: "The document could not be shown: {reason}", deeper: "Fields of {name}",
  },
  zh: {
    contents: "接口", search: "搜索", "search.hint": "接口、字段，或说明中的词", "search.none": "没有包含这些词的内容。",
    key: "API 密钥或管理员令牌", "key.text": "只保存在此标签页中，并随本页的每次调用发送。",
    copy: "复制", copied: "已复制", selected: "已选中", send: "发送", waiting: "等待中…", unanswered: "没有响应：{reason}", headers: "响应头", cut: "数据流中断。",
    parameters: "参数", body: "请求体", answers: "响应", fields: "字段", example: "示例：{name}", examples: "请求体示例", required: "必填", optional: "可选",
    file: "文件", next: "下一步：", image: "图像 {number}", elsewhere: "图像 {number}（在提供商处）", sample: "示例的语言", carried: "来自上一个响应",
    failed: "无法显示文档：{reason}", deeper: "{name} 的字段",
  },
};

export function t(name, values = {}) {
  return TEXTS[language][name].replace(/\{(\w+)\}/g, (_, key) => values[key]);
}
