-- Cancels an unfinished task: removes its entry, so that no instance starts or finishes it.
--
-- KEYS    1 stream; 2 outbox; 3 record; 4 checkpoint; 5 delivery log
-- ARGV    1 group; 2 epoch; 3 final record; 4 its life in ms; 5 checkpoint of a cancelled task, without its entry id;
--         6 its life in ms; 7 due time in the outbox, Unix ms; 8 the task's name there; 9 '1' if it has webhooks
-- result  false if there is no record, else three values: '' if the task was cancelled, else the existing record; the
--         delivery log if webhooks were added, else ''; the count of calls that may have been paid twice if it was
--         raised, else 0
local existing = redis.pcall('GET', KEYS[3])
if type(existing) ~= 'string' then return false end
local state, entry, epoch = string.match(existing, '^%d+ (%l+) (%S+) (%d+) ')
if (state ~= 'pending' and state ~= 'processing') or epoch ~= ARGV[2] then return {existing, '', 0} end
redis.call('XDEL', KEYS[1], entry)
redis.pcall('XACK', KEYS[1], ARGV[1], entry)
local count = billed_before(existing, epoch)
if count <= billed_in(ARGV[3]) then count = 0 end
redis.call('SET', KEYS[3], with_billed(ARGV[3], count), 'PX', ARGV[4])
redis.call('SET', KEYS[4], entry .. ' ' .. ARGV[5], 'PX', ARGV[6])
local log = string.match(existing, '^[^\n]* %+\n') and redis.pcall('GET', KEYS[5])
if type(log) ~= 'string' then log = '' end
if log ~= '' or ARGV[9] == '1' then redis.pcall('ZADD', KEYS[2], ARGV[7], ARGV[8]) end
return {'', log, count}
