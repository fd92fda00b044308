-- Writes final records back where they are missing, or where the task stands as it was before its end. What would run it
-- once more is deleted.
--
-- KEYS  1 stream; then one record a task
-- ARGV  1 group; then three a task: epoch, record, life in ms
-- returns one a task: 0 nothing was missing, 1 it was missing, 2 an older state stood
local stream, group, answers = KEYS[1], ARGV[1], {}
for i = 1, #KEYS - 1 do
  local at = i * 3 - 1
  local known, answer = redis.pcall('GET', KEYS[i + 1]), 1
  if type(known) == 'table' then
    answer = 0
  elseif known then
    local state, entry, epoch = string.match(known, '^%d+ (%l+) (%S+) (%d+) ')
    local unfinished = state == 'pending' or state == 'processing'
    local newer = not state or tonumber(epoch) > tonumber(ARGV[at])
    answer = (newer or (epoch == ARGV[at] and not unfinished)) and 0 or 2
    if answer == 2 and unfinished then
      redis.call('XDEL', stream, entry)
      redis.pcall('XACK', stream, group, entry)
    end
  end
  if answer > 0 then redis.call('SET', KEYS[i + 1], ARGV[at + 1], 'PX', ARGV[at + 2]) end
  answers[i] = answer
end
return answers
