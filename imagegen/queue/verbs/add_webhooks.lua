-- Adds webhooks to a task that a submit met, where nobody changed them or finished the task since they were read. An
-- unfinished task is marked, so that whoever finishes it looks for them; for a finished one they go to the outbox.
--
-- KEYS  1 outbox; 2 record; 3 hooks
-- ARGV  1 epoch; 2 '1' if the task is finished; 3 hooks as they were read, '' for none; 4 hooks as they are to be;
--       5 their life in ms; 6 when the outbox falls due, Unix ms; then their names in it, for a finished task
-- returns 1 where they were added
local known = redis.call('GET', KEYS[2])
if not known then return 0 end
local head, state, epoch, rest = string.match(known, '^(%d+ (%l+) %S+ (%d+) [^\n]*)(\n.*)$')
local finished = state ~= 'pending' and state ~= 'processing'
if epoch ~= ARGV[1] or finished ~= (ARGV[2] == '1') then return 0 end
if (redis.call('GET', KEYS[3]) or '') ~= ARGV[3] then return 0 end
redis.call('SET', KEYS[3], ARGV[4], 'PX', ARGV[5])
if not finished then
  if string.sub(head, -2) ~= ' +' then redis.call('SET', KEYS[2], head .. ' +' .. rest, 'KEEPTTL') end
  return 1
end
local due = {}
for i = 7, #ARGV do
  due[#due + 1] = ARGV[6]
  due[#due + 1] = ARGV[i]
end
redis.call('ZADD', KEYS[1], unpack(due))
return 1
