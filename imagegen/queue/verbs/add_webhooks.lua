-- Adds webhooks to a task that exists, if its delivery log and its state have not changed since they were read. The
-- record of an unfinished task is marked, so that `finish` looks for the log. The names of a finished task go to the
-- outbox.
--
-- KEYS    1 outbox; 2 record; 3 delivery log
-- ARGV    1 epoch; 2 '1' if the task is finished; 3 the log as it was read, '' for none; 4 the log to write; 5 its life
--         in ms; 6 due time in the outbox, Unix ms; then the names in the outbox, for a finished task
-- result  1 if the webhooks were added, else 0
local record = redis.call('GET', KEYS[2])
if not record then return 0 end
local head, state, epoch, rest = string.match(record, '^(%d+ (%l+) %S+ (%d+) [^\n]*)(\n.*)$')
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
