-- Writes final records. The instance that deletes a task's entry has finished the task. A later finish finds the
-- entry gone and is refused, unless no other instance finished this epoch. Tasks with webhooks are added to the outbox.
--
-- The first write is a deletion, so that a paid result is stored even when Redis is out of memory.
--
-- For each task that left the stream, the next one of its client's line is moved into it (see line_args.lua).
--
-- The count of calls that may have been paid twice is the higher one of the new record and the existing record. If it
-- is raised, another instance has continued the task, and the money that it has recorded counts.
--
-- The budgets get what the task has cost, less what they hold for it, with the write of the record. If the task had no
-- record any more, Redis may have lost what was reserved, so nothing is taken back.
--
-- KEYS    1 stream; 2 outbox; then two for each task: record, delivery log; then the budgets of each day
-- ARGV    1 group; 2 life of the records in ms; 3 due time in the outbox, Unix ms; 4 number of days with budgets; 5 life
--         of budgets in s;
--         then six for each task: entry id, epoch, record, its name in the outbox, '1' if it has webhooks, text of what
--         budgets get (see budget.lua)
-- result  four for each task: '' if it was stored, else the existing record; the delivery log if webhooks were added,
--         else ''; the count of calls that may have been paid twice if it was raised, else 0; JSON of the cost if it is
--         another instance's, else '';
--         then the commands for budgets, and five for each value of a budget: see budget.lua;
--         then for each line its client, and what `move` returns
local stream, outbox, group = KEYS[1], KEYS[2], ARGV[1]
local days, acked, due, results, settled = tonumber(ARGV[4]), {}, {}, {}, {}

local function store(record, value, epoch, text)
  local before = redis.pcall('SET', record, value, 'PX', ARGV[2], 'GET')
  if type(before) == 'table' then -- of another type: it is overwritten
    redis.call('SET', record, value, 'PX', ARGV[2])
    before = ''
  end
  if not before or before == '' then
    if text ~= '' then settled[#settled + 1] = without_return(text) end
    return '', 0, ''
  end
  local count, cost = billed_before(before, epoch), ''
  if count <= billed_in(value) then
    count = 0
  else
    value = with_billed(value, count)
    if text ~= '' then value, text, cost = with_cost_of(before, value, text) end
    redis.call('SET', record, value, 'PX', ARGV[2])
  end
  if text ~= '' then settled[#settled + 1] = text end
  return before, count, cost
end

for i = 0, (#KEYS - 2 - days) / 2 - 1 do
  local record, log_key, at = KEYS[i * 2 + 3], KEYS[i * 2 + 4], 6 + i * 6
  local entry, epoch, value = ARGV[at], ARGV[at + 1], ARGV[at + 2]
  local existing
  if redis.call('XDEL', stream, entry) == 1 then
    left_stream(i + 1)
  else
    existing = redis.pcall('GET', record)
    if type(existing) == 'table' then existing = nil end
    if existing then
      local version, state, other_entry, their_epoch = string.match(existing, '^(%d+) (%l+) (%S+) (%d+) ')
      if not version then
        existing = nil -- unreadable
      elseif tonumber(their_epoch) < tonumber(epoch) then
        existing = nil -- the submit of this epoch was lost
      elseif (state == 'pending' or state == 'processing') and their_epoch == epoch then
        if other_entry ~= IN_LINE and redis.call('XDEL', stream, other_entry) == 1 then
          acked[#acked + 1] = other_entry
          left_stream(i + 1)
        end
        existing = nil
      end
    end
  end
  if existing then
    results[i + 1] = {existing, '', 0, ''}
  else
    local before, count, cost = store(record, value, epoch, ARGV[at + 5])
    local log = string.match(before, '^[^\n]* %+\n') and redis.pcall('GET', log_key)
    if type(log) ~= 'string' then log = '' end
    if log ~= '' or ARGV[at + 4] == '1' then
      due[#due + 1] = ARGV[3]
      due[#due + 1] = ARGV[at + 3]
    end
    results[i + 1] = {'', log, count, cost}
  end
  acked[#acked + 1] = entry
end
if #due > 0 then redis.pcall('ZADD', outbox, unpack(due)) end
redis.pcall('XACK', stream, group, unpack(acked))
if days > 0 then settle(redis.pcall, keys_of_days(days), ARGV[5], settled) end
return {results, budget_reply, move_next(stream)}
