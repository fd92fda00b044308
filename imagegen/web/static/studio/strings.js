// Texts of the pages in English and Chinese.

export const STRINGS = {
  en: {
    "skip": "Skip to the content", "nav": "Pages", "nav.make": "Generate", "nav.gallery": "Gallery", "nav.board": "Board", "nav.docs": "API", "nav.help": "Help", "nav.key": "Key",
    "language": "中文", "language.label": "切换到中文", "theme": "Light or dark", 
    "prompt": "Prompt", "prompt.hint": "What should the image show?", "prompt.count": "{count} of {max} characters",
    "model": "Model", "model.default": "Default", "model.ended": "ended", "model.ends": "This model ends on {date}.", "model.successor": "Its successor is {successor}.", "model.none": "The models could not be read.",
    "size": "Size", "size.own": "Other size", "width": "Width", "height": "Height", "count": "Images", "seed": "Seed", "seed.random": "random", "steps": "Steps", "steps.own": "model's own",
    "quality": "Quality", "own": "model's own", "background": "Background", "background.transparent": "transparent", "background.opaque": "opaque", "negative": "Negative prompt", "format": "Format", "more": "More options",
    "price": "{price} for this request", "price.unknown": "Price unknown", "price.each": "{price} an image",
    "submit": "Generate", "submit.busy": "Sending …", "submit.wait": "Again in {seconds} s", "submit.keys": "Ctrl + Enter", "clear": "Clear the form",
    "inputs": "Input images", "inputs.add": "Add images", "inputs.drop": "Drop or paste images here, or choose files.", "inputs.limit": "At most {count}.", "inputs.none": "This model takes no input images. Choose another model.", "inputs.uploading": "Uploading {name} …", "inputs.remove": "Remove {name}", "inputs.failed": "{name}: {reason}", "inputs.first": "Make {name} the first",
    "mask": "Mask", "mask.paint": "Paint a mask", "mask.edit": "Change the mask", "mask.remove": "Remove the mask", "mask.set": "A mask is set: only the painted area changes.", "mask.help": "Paint over the area that is to change. With the keyboard: arrow keys move, Space paints, [ and ] change the brush, Ctrl + Z undoes.",
    "mask.brush": "Brush", "mask.erase": "Erase", "mask.undo": "Undo", "mask.clear": "Clear", "mask.invert": "Invert", "mask.done": "Use the mask", "mask.canvas": "Area that is to change", "mask.position": "Brush at {x}, {y}", "mask.preview": "The image is no longer in this page: add it again to paint on it.",
    "cancel": "Cancel", "close": "Close", "left": "You cancelled it here. Others submitted the same, so it goes on for them; its images are shown here too.",
    "state.pending": "Waiting", "state.processing": "Generating", "state.completed": "Done", "state.failed": "Failed", "state.cancelled": "Cancelled", "state.gone": "Expired", "state.unknown": "Reading …",
    "reason.queued": "in the queue", "reason.upstream_rate_limited": "the provider limits how often it is called", "reason.upstream_overloaded": "the provider is overloaded", "reason.retrying": "an attempt failed and is repeated", "reason.store_unavailable": "images cannot be saved at the moment", "reason.draining": "the service restarts",
    "place": "Place {place} in the queue", "eta": "about {seconds} s left", "retry.at": "next attempt in {seconds} s", "attempt": "attempt {attempts} of {max}", "images.ready": "{count} of {total} images", "live.away": "No connection: trying again …", "live.limited": "The service takes a limited number of requests a minute: progress is shown again in {seconds} s. The task goes on.",
    "gone": "This result has expired or is unknown here. Its images are gone.", "gone.again": "Generate again",
    "advice.content_policy": "The provider refused the content. Change the prompt or the images.", "advice.upstream_invalid_request": "The provider refused a value. Change it and submit again.", "advice.upstream_auth": "The provider refuses this service's key. Tell the operator of this service.", "advice.upstream_billing": "The provider's account has no credit. Tell the operator of this service.",
    "advice.model_not_available": "The provider does not have this model. Choose another.", "advice.retry": "This may be temporary: try again.", "advice.other": "Change the request, or ask the operator.",
    "retry": "Try again", "variant": "Another variant", "edit": "Edit this one", "again": "Same again with changes", "download": "Download", "copy": "Copy as", "copied": "Copied", "copy.failed": "Select the text to copy it", "compare": "Compare", "compare.with": "Compare with the chosen image", "compare.title": "Two images side by side", "compare.choose": "Choose a second image in the gallery.",
    "open.image": "Open image {number}", "image.alt": "Image {number}: {prompt}", "image.alt.unknown": "Image {number}", "image.next": "Next image", "image.previous": "Previous image", "image.provider": "The image is at the provider: open it there", "image.missing": "The image is gone.", "image.stale": "Older image: a new one is being generated", "cached": "This request was submitted before: this is its result.", "joined": "The same request is running already: this is its task.",
    "details": "Details", "detail.id": "Task", "detail.created": "Created", "detail.took": "Took", "detail.cost": "Cost", "detail.saved": "saved", "detail.seed": "Seed", "seconds": "{seconds} s", "warnings": "Notes",
    "recent": "Recent", "recent.none": "Nothing here yet. Write a prompt and press Ctrl + Enter.",
    "gallery": "Gallery", "gallery.search": "Search by prompt", "gallery.count": "Tasks: {count}.", "gallery.none": "No task matches.", "gallery.all": "All clients' tasks", "gallery.admin": "The tasks of all clients need the admin token as the key.", "gallery.more": "Loading more …", "gallery.keys": "Arrow keys move, Enter opens, P pins, Delete removes.", "pin": "Pin", "unpin": "Unpin", "pinned": "pinned", "remove": "Remove from the gallery", "removed": "Removed from the gallery.", "undo": "Undo", "parameters": "Parameters",
    "key.title": "API key", "key.text": "This service needs a key. It is kept for this tab alone.", "key.label": "Key", "key.wrong": "The key was refused.", "key.use": "Use the key", "key.forget": "Forget the key",
    "help.title": "Keyboard", "help.submit": "submit the form", "help.escape": "close, or go back", "help.arrows": "move in the gallery and between images", "help.enter": "open the task", "help.pin": "pin a task of the gallery", "help.delete": "remove a task of the gallery", "help.paste": "paste images into the form",
    "fault.prompt.empty": "Write a prompt.", "fault.prompt.long": "The prompt is longer than the model takes.", "fault.seed": "A whole number of at most 19 digits.", "fault.mask": "A mask needs an input image.",
    "error.no_answer": "No answer from the service. Check the connection and try again.", "error.rate_limited": "Too many requests.", "error.budget_exceeded": "The budget of the day is used up. It is reset at {time}.", "error.other": "The service refused this: {message}", "error.request": "Request {id}",
  },
  zh: {
    "skip": "跳到内容", "nav": "页面", "nav.make": "生成", "nav.gallery": "图库", "nav.board": "看板", "nav.docs": "API", "nav.help": "帮助", "nav.key": "密钥",
    "language": "English", "language.label": "Switch to English", "theme": "浅色或深色", 
    "prompt": "提示词", "prompt.hint": "图像要表现什么？", "prompt.count": "{count} / {max} 个字符",
    "model": "模型", "model.default": "默认模型", "model.ended": "已停用", "model.ends": "此模型将于 {date} 停用。", "model.successor": "后继模型：{successor}。", "model.none": "无法读取模型列表。",
    "size": "尺寸", "size.own": "其他尺寸", "width": "宽", "height": "高", "count": "张数", "seed": "种子", "seed.random": "随机", "steps": "步数", "steps.own": "模型默认",
    "quality": "质量", "own": "模型默认", "background": "背景", "background.transparent": "透明", "background.opaque": "不透明", "negative": "反向提示词", "format": "格式", "more": "更多选项",
    "price": "本次请求 {price}", "price.unknown": "价格未知", "price.each": "每张 {price}",
    "submit": "生成", "submit.busy": "正在提交…", "submit.wait": "{seconds} 秒后可再试", "submit.keys": "Ctrl + Enter", "clear": "清空表单",
    "inputs": "输入图像", "inputs.add": "添加图像", "inputs.drop": "将图像拖放或粘贴到这里，或选择文件。", "inputs.limit": "最多 {count} 张。", "inputs.none": "此模型不接受输入图像，请选择其他模型。", "inputs.uploading": "正在上传 {name}…", "inputs.remove": "移除 {name}", "inputs.failed": "{name}：{reason}", "inputs.first": "将 {name} 设为第一张",
    "mask": "蒙版", "mask.paint": "绘制蒙版", "mask.edit": "修改蒙版", "mask.remove": "移除蒙版", "mask.set": "已设置蒙版：只有涂抹的区域会改变。", "mask.help": "涂抹需要改变的区域。键盘：方向键移动，空格涂抹，[ 和 ] 调整画笔，Ctrl + Z 撤销。",
    "mask.brush": "画笔", "mask.erase": "擦除", "mask.undo": "撤销", "mask.clear": "清除", "mask.invert": "反选", "mask.done": "使用蒙版", "mask.canvas": "需要改变的区域", "mask.position": "画笔位置 {x}, {y}", "mask.preview": "页面中已没有此图像：请重新添加后再绘制。",
    "cancel": "取消", "close": "关闭", "left": "你已在此取消。其他人也提交了相同的请求，任务为他们继续，图像也会显示在这里。",
    "state.pending": "等待中", "state.processing": "生成中", "state.completed": "完成", "state.failed": "失败", "state.cancelled": "已取消", "state.gone": "已过期", "state.unknown": "正在读取…",
    "reason.queued": "排队中", "reason.upstream_rate_limited": "上游限制了调用频率", "reason.upstream_overloaded": "上游过载", "reason.retrying": "上次尝试失败，将重试", "reason.store_unavailable": "暂时无法保存图像", "reason.draining": "服务正在重启",
    "place": "队列第 {place} 位", "eta": "约剩 {seconds} 秒", "retry.at": "{seconds} 秒后再次尝试", "attempt": "第 {attempts} / {max} 次尝试", "images.ready": "{count} / {total} 张图像", "live.away": "连接中断：正在重试…", "live.limited": "每分钟的请求数有限：{seconds} 秒后继续显示进度，图像仍在生成。",
    "gone": "此结果已过期或不存在，图像已被删除。", "gone.again": "重新生成",
    "advice.content_policy": "内容被上游拒绝。请修改提示词或图像。", "advice.upstream_invalid_request": "上游拒绝了某个参数。请修改后重新提交。", "advice.upstream_auth": "上游拒绝了本服务的密钥，需由运营者处理。", "advice.upstream_billing": "上游账户余额不足，需由运营者处理。",
    "advice.model_not_available": "上游没有此模型。请选择其他模型。", "advice.retry": "可能是暂时的：请重试。", "advice.other": "请修改请求，或联系运营者。",
    "retry": "重试", "variant": "再来一个变体", "edit": "编辑这张", "again": "修改后再生成", "download": "下载", "copy": "复制为", "copied": "已复制", "copy.failed": "请选中文本复制", "compare": "对比", "compare.with": "与所选图像对比", "compare.title": "两张图像并排", "compare.choose": "请在图库中选择第二张图像。",
    "open.image": "打开第 {number} 张图像", "image.alt": "图像 {number}：{prompt}", "image.alt.unknown": "图像 {number}", "image.next": "下一张", "image.previous": "上一张", "image.provider": "图像在上游服务器上：在那里打开", "image.missing": "图像已被删除。", "image.stale": "旧图像：新的正在生成", "cached": "此请求以前生成过：这是它的结果。", "joined": "相同的请求正在生成：正在跟随它。",
    "details": "详情", "detail.id": "任务", "detail.created": "创建时间", "detail.took": "用时", "detail.cost": "费用", "detail.saved": "节省", "detail.seed": "种子", "seconds": "{seconds} 秒", "warnings": "说明",
    "recent": "最近", "recent.none": "还没有内容。输入提示词并按 Ctrl + Enter。",
    "gallery": "图库", "gallery.search": "按提示词搜索", "gallery.count": "{count} 个任务。", "gallery.none": "没有匹配的任务。", "gallery.all": "所有客户端的任务", "gallery.admin": "查看所有客户端的任务需要以管理员令牌作为密钥。", "gallery.more": "正在加载更多…", "gallery.keys": "方向键移动，Enter 打开，P 置顶，Delete 移除。", "pin": "置顶", "unpin": "取消置顶", "pinned": "已置顶", "remove": "从图库移除", "removed": "已从图库移除。", "undo": "撤销", "parameters": "参数",
    "key.title": "API 密钥", "key.text": "此服务需要密钥。密钥只保存在当前标签页。", "key.label": "密钥", "key.wrong": "密钥被拒绝。", "key.use": "使用密钥", "key.forget": "忘记密钥",
    "help.title": "键盘", "help.submit": "提交表单", "help.escape": "关闭或返回", "help.arrows": "在图库和图像之间移动", "help.enter": "打开任务", "help.pin": "置顶图库中的任务", "help.delete": "移除图库中的任务", "help.paste": "将图像粘贴到表单",
    "fault.prompt.empty": "请输入提示词。", "fault.prompt.long": "提示词超过了模型的长度限制。", "fault.seed": "最多 19 位的整数。", "fault.mask": "蒙版需要一张输入图像。",
    "error.no_answer": "服务没有响应。请检查连接后重试。", "error.rate_limited": "请求过于频繁。", "error.budget_exceeded": "今日预算已用完，将于 {time} 重置。", "error.other": "服务拒绝了请求：{message}", "error.request": "请求 {id}",
  },
};

// Adds the texts of another page: {en: {name: text}, zh: {name: text}}.
export function addStrings(more) {
  for (const [language, texts] of Object.entries(more)) Object.assign(STRINGS[language], texts);
}

export const LANGUAGES = Object.keys(STRINGS);

// Returns the language to begin with: the one that was chosen, else the browser's first that we have.
export function initialLanguage(chosen, preferred) {
  if (LANGUAGES.includes(chosen)) return chosen;
  return preferred.map((tag) => tag.slice(0, 2).toLowerCase()).find((tag) => LANGUAGES.includes(tag)) || "en";
}

export function translate(language, name, values = {}) {
  const text = STRINGS[language][name] ?? STRINGS.en[name] ?? name;
  return text.replace(/\{(\w+)\}/g, (_, part) => values[part] ?? "");
}
