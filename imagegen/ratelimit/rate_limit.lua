-- Spends from rate-limit windows. A hit spends from each of its windows, or from none; those of one call come in turn.
--
-- A window is one string of 'time count' pairs in ms of the server's clock, oldest first. Above 100 allowed hits a time
-- is rounded up to a hundredth of the window, so that the string stays short; it never admits more than the limit.
-- A cost of 0 only looks. After the clock was set back, a time that is ahead of it counts as now, for one more window.
-- Costs a TIME, an MGET, and one SET for each window that was spent from, or that had a time ahead of the clock.
--
-- KEYS    the windows, each once
-- ARGV    for each hit: cost, number of windows; then for each window: its place in KEYS, limit, length in ms
-- result  for each hit, for each window: {remaining, ms until some of it comes back, ms until the hit would pass or 0}
local clock = redis.call('TIME')
local now = clock[1] * 1000 + math.floor(clock[2] / 1000)
local stored, logs, lengths, next_arg = redis.call('MGET', unpack(KEYS)), {}, {}, 1

local function arg()
  next_arg = next_arg + 1
  return tonumber(ARGV[next_arg - 1])
end

local function log_of(place, length)
  if logs[place] then return logs[place] end
  local log, latest = {spent = 0}, now + math.max(math.floor(length / 100), 1)
  for time, count in string.gmatch(stored[place] or '', '(%d+) (%d+)') do
    time, count = tonumber(time), tonumber(count)
    if time > latest then time, log.changed = now, true end
    if time + length > now then
      log[#log + 1] = {time, count}
      log.spent = log.spent + count
    end
  end
  logs[place], lengths[place] = log, length
  return log
end

local function wait_ms(log, limit, length, cost)
  local over = log.spent + cost - limit
  if over <= 0 then return 0 end
  for _, pair in ipairs(log) do
    over = over - pair[2]
    if over <= 0 then return pair[1] + length - now end
  end
  return length
end

local function spend(log, limit, length, cost)
  local step = limit > 100 and math.max(math.floor(length / 100), 1) or 1
  local time, last = now - now % step + step - 1, log[#log]
  if last and last[1] >= time then last[2] = last[2] + cost else log[#log + 1] = {time, cost} end
  log.spent, log.changed = log.spent + cost, true
end

local answers = {}
while next_arg <= #ARGV do
  local cost, windows, passes, answer = arg(), {}, true, {}
  for i = 1, arg() do
    local place, limit, length = arg(), arg(), arg()
    local log = log_of(place, length)
    windows[i] = {log, limit, length, wait_ms(log, limit, length, cost)}
    passes = passes and windows[i][4] == 0
  end
  for i, window in ipairs(windows) do
    local log, limit, length, wait = unpack(window)
    if passes and cost > 0 then spend(log, limit, length, cost) end
    answer[i] = {limit - log.spent, log[1] and log[1][1] + length - now or 0, wait}
  end
  answers[#answers + 1] = answer
end

for place, log in pairs(logs) do
  if log.changed then
    local pairs_of_log = {}
    for i, pair in ipairs(log) do pairs_of_log[i] = string.format('%.0f %.0f', pair[1], pair[2]) end
    local life = lengths[place] + math.ceil(lengths[place] / 100)
    redis.call('SET', KEYS[place], table.concat(pairs_of_log, ' '), 'PX', life)
  end
end
return answers
