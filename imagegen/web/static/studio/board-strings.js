// Texts of the board in English and Chinese.

export const BOARD_STRINGS = {
  en: {
    "board": "Board", "live": "Live", "lost": "No connection", "paused": "Claiming is paused since {time}", "loops.none": "No loop alive: no task starts on this instance", "redis.away": "Redis does not answer",
    "store.refuses": "Images can't be saved", "key.refused": "The provider refuses the key", "draining": "This instance is about to stop",
    "pause": "Pause", "resume": "Resume", "pause.hint": "Running tasks finish, new ones are accepted and wait.", "pause.failed": "This did not work: {message}",
    "token.title": "Admin token", "token.text": "The board needs the admin token: ADMIN_TOKEN, or the content of admin.token in the data folder. It is kept for this tab alone.", "token.label": "Admin token", "token.wrong": "The token was refused.", "token.use": "Open the board", "token.forget": "Forget the token",
    "tile.waiting": "Waiting", "tile.oldest": "the oldest for {time}", "tile.running": "Running", "tile.slots": "of {slots} slots here, {retrying} before a retry", "tile.today": "Done today", "tile.failed": "{failed} failed, {cancelled} cancelled, {images} images",
    "tile.wait": "Wait, median", "tile.run": "Run, median", "tile.p95": "95 % within {time}", "tile.spent": "Spent today", "tile.saved": "{saved} saved by cache and joins", "tile.budget": "{left} left of {limit}", "tile.hits": "Cache hits", "tile.hits.of": "of the submits of the last hour",
    "tile.redis": "Redis commands, last hour", "tile.plan": "{share} % of a month's plan of {plan}, at this rate", "tile.instances": "Instances", "tile.upstream": "Provider", "tile.upstream.free": "takes calls", "tile.upstream.until": "until {time}: {reason}", "tile.limits": "{calls} at once, {rate}", "rate.none": "no rate limit", "rate": "{rate} a minute",
    "history": "History", "hours": "{hours} h", "hours.label": "Time span", "history.none": "No history yet.",
    "plot.tasks": "Ended tasks a minute", "plot.depth": "Waiting and running", "plot.oldest": "Oldest waiting task (s)", "plot.wait": "Wait until the first attempt (s)", "plot.run": "Run time of attempts (s)", "plot.cache": "Submits a minute", "plot.money": "US dollars a minute", "plot.upstream": "Calls to the provider a minute", "plot.redis": "Redis commands an hour",
    "series.completed": "done", "series.failed": "failed", "series.cancelled": "cancelled", "series.depth": "waiting", "series.inFlight": "running", "series.oldest": "oldest", "series.p50": "median", "series.p95": "95 %", "series.miss": "new", "series.hit": "cache hits", "series.coalesced": "joined", "series.spent": "spent", "series.saved": "saved", "series.commands": "commands", "series.plan": "month's plan",
    "tasks": "Tasks", "filter.all": "All", "filter.pending": "Waiting", "filter.processing": "Running", "filter.failed": "Failed", "filter.completed": "Done", "filter.cancelled": "Cancelled", "tasks.none": "No tasks.", "tasks.more": "Load older ones", "tasks.load": "Load all from Redis", "tasks.count": "{count} tasks",
    "col.state": "State", "col.prompt": "Prompt", "col.cause": "Cause", "col.model": "Model", "col.key": "Key", "col.attempts": "Attempts", "col.created": "Submitted", "col.action": "Action", "prompt.unknown": "(not known here)", "act.retry": "Retry", "act.cancel": "Cancel", "act.retry.of": "Retry task {id}", "act.cancel.of": "Cancel task {id}", "act.failed": "{id}: {message}",
    "channels": "Channels and keys", "channel.until": "until {time}", "channel.calls": "{calls} calls, {inFlight} running", "channelState.healthy": "healthy", "channelState.cooling": "cooling", "channelState.resting": "resting", "channelState.out": "out",
  },
  zh: {
    "board": "看板", "live": "实时", "lost": "连接中断", "paused": "自 {time} 起暂停领取任务", "loops.none": "没有存活的循环：此实例不会开始任何任务", "redis.away": "Redis 没有响应",
    "store.refuses": "无法保存图像", "key.refused": "上游拒绝了密钥", "draining": "此实例即将停止",
    "pause": "暂停", "resume": "恢复", "pause.hint": "正在运行的任务会完成，新任务会被接受并等待。", "pause.failed": "操作失败：{message}",
    "token.title": "管理员令牌", "token.text": "看板需要管理员令牌：ADMIN_TOKEN，或数据目录中 admin.token 的内容。它只保存在当前标签页。", "token.label": "管理员令牌", "token.wrong": "令牌被拒绝。", "token.use": "打开看板", "token.forget": "清除令牌",
    "tile.waiting": "等待", "tile.oldest": "最早的已等 {time}", "tile.running": "运行", "tile.slots": "此实例共 {slots} 个槽位，{retrying} 个等待重试", "tile.today": "今日完成", "tile.failed": "失败 {failed}，取消 {cancelled}，图像 {images}",
    "tile.wait": "等待时间中位数", "tile.run": "运行时间中位数", "tile.p95": "95% 在 {time} 内", "tile.spent": "今日花费", "tile.saved": "缓存与合并节省 {saved}", "tile.budget": "剩余 {left} / {limit}", "tile.hits": "缓存命中", "tile.hits.of": "占最近一小时的提交",
    "tile.redis": "Redis 命令（最近一小时）", "tile.plan": "按此速度为每月套餐 {plan} 的 {share}%", "tile.instances": "实例", "tile.upstream": "上游", "tile.upstream.free": "可调用", "tile.upstream.until": "至 {time}：{reason}", "tile.limits": "并发 {calls}，{rate}", "rate.none": "无速率限制", "rate": "每分钟 {rate}",
    "history": "历史", "hours": "{hours} 小时", "hours.label": "时间范围", "history.none": "还没有历史。",
    "plot.tasks": "每分钟结束的任务", "plot.depth": "等待与运行", "plot.oldest": "最早等待的任务（秒）", "plot.wait": "首次尝试前的等待（秒）", "plot.run": "尝试的运行时间（秒）", "plot.cache": "每分钟提交", "plot.money": "每分钟美元", "plot.upstream": "每分钟上游调用", "plot.redis": "每小时 Redis 命令",
    "series.completed": "完成", "series.failed": "失败", "series.cancelled": "取消", "series.depth": "等待", "series.inFlight": "运行", "series.oldest": "最早", "series.p50": "中位数", "series.p95": "95%", "series.miss": "新任务", "series.hit": "缓存命中", "series.coalesced": "合并", "series.spent": "花费", "series.saved": "节省", "series.commands": "命令", "series.plan": "月套餐",
    "tasks": "任务", "filter.all": "全部", "filter.pending": "等待", "filter.processing": "运行", "filter.failed": "失败", "filter.completed": "完成", "filter.cancelled": "已取消", "tasks.none": "没有任务。", "tasks.more": "加载更早的", "tasks.load": "从 Redis 加载全部", "tasks.count": "{count} 个任务",
    "col.state": "状态", "col.prompt": "提示词", "col.cause": "原因", "col.model": "模型", "col.key": "密钥", "col.attempts": "尝试", "col.created": "提交时间", "col.action": "操作", "prompt.unknown": "（此处未知）", "act.retry": "重试", "act.cancel": "取消", "act.retry.of": "重试任务 {id}", "act.cancel.of": "取消任务 {id}", "act.failed": "{id}：{message}",
    "channels": "通道与密钥", "channel.until": "至 {time}", "channel.calls": "{calls} 次调用，{inFlight} 次进行中", "channelState.healthy": "正常", "channelState.cooling": "冷却中", "channelState.resting": "休息中", "channelState.out": "停用",
  },
};
