-- Writes final records. Whoever deletes a task's entry has finished it; one that comes late finds the entry gone
-- and is refused, unless nobody else finished this generation.
--
-- The first write is a deletion, so that a paid result is stored even when Redis is out of memory.
--
-- KEYS  1 stream; then one record a task
-- ARGV  1 group; 2 life of the records in ms; then three a task: entry id, generation, record
-- returns one answer a task: '' stored, else the record that stands
local stream, group = KEYS[1], ARGV[1]
local done, answers = {}, {}
for i = 0, #KEYS - 2 do
  local record, at = KEYS[i + 2], 3 + i * 3
  local entry, generation, value = ARGV[at], ARGV[at + 1], ARGV[at + 2]
  local stands
  if redis.call('XDEL', stream, entry) == 0 then
    stands = redis.call('GET', record)
    if stands then
      local state, other, their_generation = string.match(stands, '^%d+ (%l+) (%S+) (%d+) ')
      if (state == 'pending' or state == 'processing') and their_generation == generation then
        if redis.call('XDEL', stream, other) == 1 then done[#done + 1] = other end
        stands = nil
      end
    end
  end
  if stands then
    answers[i + 1] = stands
  else
    redis.call('SET', record, value, 'PX', ARGV[2])
    answers[i + 1] = ''
  end
  done[#done + 1] = entry
end
redis.pcall('XACK', stream, group, unpack(done))
return answers
