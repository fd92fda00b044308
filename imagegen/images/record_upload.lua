-- Writes the record of an upload, and never shortens its life.
--
-- A record is '<expires> <needed until> <description>'; both are Unix times in ms. Anything else is replaced.
--
-- KEYS    1 record
-- ARGV    1 expires; 2 needed until; 3 description; 4 ms that the record is kept beyond both
-- result  the record
local expires, needed = tonumber(ARGV[1]), tonumber(ARGV[2])
local before = redis.pcall('GET', KEYS[1])
if type(before) == 'string' then
  local expired, was_needed = string.match(before, '^(%d+) (%d+) ')
  expires, needed = math.max(expires, tonumber(expired) or 0), math.max(needed, tonumber(was_needed) or 0)
end
local record = string.format('%.0f %.0f ', expires, needed) .. ARGV[3]
redis.call('SET', KEYS[1], record, 'PXAT', string.format('%.0f', math.max(expires, needed) + tonumber(ARGV[4])))
return record
