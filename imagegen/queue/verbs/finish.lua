-- Writes final records. Whoever deletes a task's entry has finished it; one that comes late finds the entry gone
-- and is refused, unless nobody else finished this epoch. What webhooks wait for goes into the outbox with it.
--
-- The first write is a deletion, so that a paid result is stored even when Redis is out of memory.
--
-- The count of calls that may have been paid twice is the higher one of the new record and of the record that was there.
--
-- KEYS  1 stream; 2 outbox; then two a task: record, hooks
-- ARGV  1 group; 2 life of the records in ms; 3 when the outbox falls due, Unix ms;
--       then five a task: entry id, epoch, record, its name in the outbox, '1' if it brought webhooks along
-- returns three a task: '' stored, else the record that stands; the hooks where webhooks joined, else '';
--         the count of calls that may have been paid twice where it was raised, else 0
local stream, outbox, group = KEYS[1], KEYS[2], ARGV[1]
local done, due, answers = {}, {}, {}

local function store(record, value, epoch)
  local before = redis.pcall('SET', record, value, 'PX', ARGV[2], 'GET')
  if type(before) == 'table' then -- something foreign was there, which has no place here
    redis.call('SET', record, value, 'PX', ARGV[2])
    return '', 0
  end
  before = before or ''
  local count = billed_before(before, epoch)
  if count <= billed_in(value) then return before, 0 end
  redis.call('SET', record, with_billed(value, count), 'PX', ARGV[2])
  return before, count
end

for i = 0, (#KEYS - 2) / 2 - 1 do
  local record, hooks, at = KEYS[i * 2 + 3], KEYS[i * 2 + 4], 4 + i * 5
  local entry, epoch, value = ARGV[at], ARGV[at + 1], ARGV[at + 2]
  local stands
  if redis.call('XDEL', stream, entry) == 0 then
    stands = redis.pcall('GET', record)
    if type(stands) == 'table' then stands = nil end
    if stands then
      local version, state, other, their_epoch = string.match(stands, '^(%d+) (%l+) (%S+) (%d+) ')
      if not version then
        stands = nil -- unreadable
      elseif tonumber(their_epoch) < tonumber(epoch) then
        stands = nil -- the submit of this epoch was lost
      elseif (state == 'pending' or state == 'processing') and their_epoch == epoch then
        if redis.call('XDEL', stream, other) == 1 then done[#done + 1] = other end
        stands = nil
      end
    end
  end
  if stands then
    answers[i + 1] = {stands, '', 0}
  else
    local before, count = store(record, value, epoch)
    local joined = string.match(before, '^[^\n]* %+\n') and redis.pcall('GET', hooks)
    if type(joined) ~= 'string' then joined = '' end
    if joined ~= '' or ARGV[at + 4] == '1' then
      due[#due + 1] = ARGV[3]
      due[#due + 1] = ARGV[at + 3]
    end
    answers[i + 1] = {'', joined, count}
  end
  done[#done + 1] = entry
end
if #due > 0 then redis.pcall('ZADD', outbox, unpack(due)) end
redis.pcall('XACK', stream, group, unpack(done))
return answers
