-- Writes final records back that are missing, or replaced by a state before the end. The entry of an unfinished task is
-- deleted, so that the task does not run once more.
--
-- A task that was completed twice, by instances that used different servers for a while, has two results: the one in
-- Redis stays, and counts a call that was paid twice. If it did not count one before, the budgets get what the other
-- result has cost.
--
-- KEYS    1 stream; then a record for each task; then the budgets of each day
-- ARGV    1 group; 2 number of days with budgets; 3 life of budgets in s; then four for each task: epoch, record, life in
--         ms, text of what budgets get (see budget.lua), or ''
-- result  one for each task: 0 nothing was missing, 1 the record was missing, 2 Redis had an older state, 3 Redis has
--         another result; then values of budgets
local stream, group, days, results, charged = KEYS[1], ARGV[1], tonumber(ARGV[2]), {}, {}

-- Returns the mark of a result: its last field of this name, since a client writes the request before it.
local function mark_of(record)
  return string.match(record, '^%d+ completed .*"counted":"([^"]+)"')
end

for i = 1, #KEYS - 1 - days do
  local at = i * 4
  local existing, result = redis.pcall('GET', KEYS[i + 1]), 1
  if type(existing) == 'table' then
    result = 0
  elseif existing then
    local state, entry, epoch = string.match(existing, '^%d+ (%l+) (%S+) (%d+) ')
    local unfinished = state == 'pending' or state == 'processing'
    local newer = not state or tonumber(epoch) > tonumber(ARGV[at])
    result = (newer or (epoch == ARGV[at] and not unfinished)) and 0 or 2
    if result == 2 and unfinished then
      redis.pcall('XDEL', stream, entry) -- not of a task in a line
      redis.pcall('XACK', stream, group, entry)
    end
  end
  local mark = result == 0 and type(existing) == 'string' and mark_of(ARGV[at + 1])
  local other = mark and string.match(existing, '^%d+ %l+ %S+ (%d+) ') == ARGV[at] and mark_of(existing)
  if other and other ~= mark then
    result = 3
    local counted = with_billed(existing, 1)
    if counted ~= existing then
      redis.call('SET', KEYS[i + 1], counted, 'KEEPTTL')
      if ARGV[at + 3] ~= '' then charged[#charged + 1] = ARGV[at + 3] end
    end
  elseif result > 0 then
    redis.call('SET', KEYS[i + 1], ARGV[at + 1], 'PX', ARGV[at + 2])
  end
  results[i] = result
end
if #charged > 0 then settle(redis.pcall, keys_of_days(days), ARGV[3], charged) end
return {results, budget_reply}
