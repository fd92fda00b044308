-- Raises the count of calls that may have been paid twice in the record of a task.
--
-- KEYS    1 record
-- ARGV    1 epoch; 2 count
-- result  1 if the record was written; 0 if it is of another epoch, of a cancelled task, or has this count
local record = redis.pcall('GET', KEYS[1])
if type(record) ~= 'string' then return 0 end
local state, epoch = string.match(record, '^%d+ (%l+) %S+ (%d+) ')
if epoch ~= ARGV[1] or state == 'cancelled' then return 0 end
local changed = with_billed(record, tonumber(ARGV[2]))
if changed == record then return 0 end
redis.call('SET', KEYS[1], changed, 'KEEPTTL')
return 1
