-- Writes the run of a task that another instance may hold, or may have run before, if the entry is ours. A count of
-- calls that may have been paid twice goes into the record too, where whoever finishes the task finds it.
--
-- KEYS  1 stream; 2 record; 3 run
-- ARGV  1 group; 2 consumer; 3 entry id; 4 epoch; 5 life of a run in ms; 6 the run that we know, '' for none;
--       7 the run to write; 8 calls that may have been paid twice
-- returns {'' written, 'lost' not ours, 'other' another run is there; that run; commands without the script itself}
local entry, epoch, life, expected, value, count = unpack(ARGV, 3)
local pending = redis.pcall('XPENDING', KEYS[1], ARGV[1], entry, entry, 1)
local record = redis.pcall('GET', KEYS[2])
if type(record) ~= 'string' then record = '' end
if pending.err or #pending == 0 then -- finished, or the server lost its data: then no other instance has it
  local state, named, theirs = string.match(record, '^%d+ (%l+) (%S+) (%d+) ')
  local unfinished = state == 'pending' or state == 'processing'
  if state and not (unfinished and named == entry and theirs == epoch) then return {'lost', '', 2} end
elseif pending[1][2] ~= ARGV[2] then
  return {'lost', '', 2}
end
local run = redis.pcall('GET', KEYS[3])
if type(run) == 'string' and run ~= expected and run ~= value then return {'other', run, 3} end
redis.call('SET', KEYS[3], value, 'PX', life)
count = tonumber(count)
if count > 0 and string.match(record, '^%d+ %l+ %S+ (%d+) ') == epoch and billed_in(record) < count then
  redis.call('SET', KEYS[2], with_billed(record, count), 'KEEPTTL')
  return {'', '', 5}
end
return {'', '', 4}
