-- Raises the count of calls that may have been paid twice in the record of a task. The budgets get what they cost.
--
-- A call with a mark is recorded once: a repeat returns what the first one has recorded. The record of a cancelled task
-- stays as it is; only the budgets get what its end lacks.
--
-- KEYS    1 record; 2 mark, the record again for none; 3 the budgets that hold the task, if they get anything
-- ARGV    1 epoch; 2 count; 3 text of what budgets get (see budget.lua), or ''; 4 their life in s; 5 value of the mark, count
--         and price; 6 its life in s
-- result  1 if something was recorded; 0 if the record is of another epoch, or has this count; values of budgets; the
--         value of the mark
local mark = KEYS[2] ~= KEYS[1] and redis.pcall('GET', KEYS[2])
if type(mark) == 'string' and string.find(mark, '^%d+ %d+$') then return {1, budget_reply, mark} end
local record = redis.pcall('GET', KEYS[1])
if type(record) ~= 'string' then return {0, budget_reply, ''} end
local state, epoch = string.match(record, '^%d+ (%l+) %S+ (%d+) ')
if epoch ~= ARGV[1] then return {0, budget_reply, ''} end
if state == 'cancelled' then
  if not string.find(ARGV[5], '^0 [1-9]') then return {0, budget_reply, ''} end
else
  local changed = with_billed(record, tonumber(ARGV[2]))
  if changed == record then return {0, budget_reply, ''} end
  redis.call('SET', KEYS[1], changed, 'KEEPTTL')
end
if KEYS[2] ~= KEYS[1] then redis.call('SET', KEYS[2], ARGV[5], 'EX', ARGV[6]) end
if ARGV[3] ~= '' then settle(redis.pcall, keys_of_days(1), ARGV[4], {ARGV[3]}) end
return {1, budget_reply, ARGV[5]}
